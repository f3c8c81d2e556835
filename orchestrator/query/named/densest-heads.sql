-- the 20 heads of each run whose core slices have the highest density
with
    -- Where a group was encoded twice, the later encoding is the group's.
    current as (
        from groups
        qualify row_number() over (
            partition by run, block order by started_at desc nulls last, task_id desc
        ) = 1
    )
select run, layer, block, projection, head, density, nnz, core_bytes, relative_error
from slices
semi join current using (run, task_id)
qualify
    row_number() over (partition by run order by density desc nulls last, layer, block, projection, head) <= 20
order by run, density desc nulls last, layer, block, projection, head
