-- the 20 heads of each run whose core slices have the lowest density
select run, layer, "group", projection, head, density, nnz, core_bytes, relative_error
from slices
semi join groups using (run, task_id)
qualify
    row_number() over (partition by run order by density nulls last, layer, "group", projection, head) <= 20
order by run, density nulls last, layer, "group", projection, head
