-- the 20 groups of each run with the largest relative error, and their share of the squared error
select
    run,
    layer,
    block,
    relative_error,
    squared_error / sum(squared_error) over (partition by run) as share_of_error,
    stored_bytes / dense_bytes as keep,
    R1,
    R2,
    R3,
    density
from current
qualify
    row_number() over (
        partition by run order by relative_error desc nulls last, layer, block
    ) <= 20
order by run, relative_error desc nulls last, layer, block
