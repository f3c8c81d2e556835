-- ranks, non-zeros and codec of each group
select run, layer, "group", R1, R2, R3, nnz, density, codec, hooi_iterations, threshold
from groups
order by run, layer, "group"
