-- where the bytes went: core bytes of each projection, and the factors that they share
with
    committed as (
        from slices semi join groups using (run, task_id)
    ),
    parts as (
        select run, projection as part, count(*) as slices, sum(nnz) as nnz, sum(core_bytes) as bytes
        from committed
        group by all
        union all
        select run, 'factors', null, null, sum(bytes)
        from (
            select run, sum(stored_bytes) as bytes from groups group by run
            union all
            select run, -sum(core_bytes) from committed group by run
        )
        group by run
    )
select run, part, slices, nnz, bytes, bytes / sum(bytes) over (partition by run) as share
from parts
order by run, bytes desc, part
