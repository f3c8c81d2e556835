-- ranks, non-zeros and codec of each group
select run, layer, block, R1, R2, R3, nnz, density, codec, hooi_iterations, threshold
from current
order by run, layer, block
