-- where the bytes went: core bytes of each projection, and the factors that they share
with
    parts as (
        select run, projection as part, count(*) as slices, sum(nnz) as nnz, sum(core_bytes) as bytes
        from current_slices
        group by all
        union all
        select run, 'factors', null, null, sum(bytes)
        from (
            select run, sum(stored_bytes) as bytes from current group by run
            union all
            select run, -sum(core_bytes) from current_slices group by run
        )
        group by run
    )
select run, part, slices, nnz, bytes, bytes / sum(bytes) over (partition by run) as share
from parts
order by run, bytes desc, part
