-- ranks, non-zeros and codec of each group
with
    -- Where a group was encoded twice, the later encoding is the group's.
    current as (
        from groups
        qualify row_number() over (
            partition by run, block order by started_at desc nulls last, task_id desc
        ) = 1
    )
select run, layer, block, R1, R2, R3, nnz, density, codec, hooi_iterations, threshold
from current
order by run, layer, block
