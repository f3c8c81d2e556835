-- energy kept in each layer: by the full core of Stage I, and by the stored core of Stage II
select
    run,
    layer,
    sum(squared_norm) as squared_norm,
    sum(squared_energy_stage1) / sum(squared_norm) as kept_stage1,
    sum(squared_energy_stage2) / sum(squared_norm) as kept_stage2,
    sum(squared_energy_stage2) / sum(squared_energy_stage1) as kept_by_pruning,
    sqrt(sum(squared_error) / sum(squared_norm)) as relative_error
from current
group by run, layer
order by run, layer
