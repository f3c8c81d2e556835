-- where the bytes went: core bytes of each projection, and the factors that they share
with
    -- Where a group was encoded twice, the later encoding is the group's.
    current as (
        from groups
        qualify row_number() over (
            partition by run, block order by started_at desc nulls last, task_id desc
        ) = 1
    ),
    committed as (
        from slices semi join current using (run, task_id)
    ),
    parts as (
        select run, projection as part, count(*) as slices, sum(nnz) as nnz, sum(core_bytes) as bytes
        from committed
        group by all
        union all
        select run, 'factors', null, null, sum(bytes)
        from (
            select run, sum(stored_bytes) as bytes from current group by run
            union all
            select run, -sum(core_bytes) from committed group by run
        )
        group by run
    )
select run, part, slices, nnz, bytes, bytes / sum(bytes) over (partition by run) as share
from parts
order by run, bytes desc, part
