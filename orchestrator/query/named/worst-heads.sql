-- the 20 heads of each run with the largest relative error
select run, layer, block, projection, head, density, nnz, core_bytes, relative_error
from current_slices
qualify
    row_number() over (partition by run order by relative_error desc nulls last, layer, block, projection, head) <= 20
order by run, relative_error desc nulls last, layer, block, projection, head
