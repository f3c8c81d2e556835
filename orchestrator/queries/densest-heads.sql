-- the 20 heads of each run whose core slices have the highest density
select run, layer, "group", projection, head, density, nnz, core_bytes, relative_error
from slices
semi join groups using (run, task_id)
qualify
    row_number() over (partition by run order by density desc nulls last, layer, "group", projection, head) <= 20
order by run, density desc nulls last, layer, "group", projection, head
