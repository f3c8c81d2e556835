-- how the cores are stored: groups, non-zeros and bytes of each codec
with
    -- Where a group was encoded twice, the later encoding is the group's.
    current as (
        from groups
        qualify row_number() over (
            partition by run, block order by started_at desc nulls last, task_id desc
        ) = 1
    )
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
