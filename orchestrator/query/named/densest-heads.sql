-- the 20 heads of each run whose core slices have the highest density
select run, layer, block, projection, head, density, nnz, core_bytes, relative_error
from current_slices
qualify
    row_number() over (partition by run order by density desc nulls last, layer, block, projection, head) <= 20
order by run, density desc nulls last, layer, block, projection, head
