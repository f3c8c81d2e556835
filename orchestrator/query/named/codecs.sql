-- how the cores are stored: groups, non-zeros and bytes of each codec
select
    run,
    codec,
    count(*) as groups,
    sum(nnz) as nnz,
    sum(stored_bytes) as stored_bytes,
    avg(density) as mean_density
from current
group by run, codec
order by run, stored_bytes desc, codec
