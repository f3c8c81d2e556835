-- where the bytes went: dense and stored bytes of each layer, and its share of the run
select
    run,
    layer,
    sum(dense_bytes) as dense_bytes,
    sum(byte_budget) as byte_budget,
    sum(stored_bytes) as stored_bytes,
    sum(stored_bytes) / sum(dense_bytes) as keep,
    sum(stored_bytes) / sum(sum(stored_bytes)) over (partition by run) as share
from current
group by run, layer
order by run, layer
