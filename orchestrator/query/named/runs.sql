-- every call of lestd compress: when, with what, how far it came
select
    run, invocation, state, started_at, seconds, model, method, allocation, keep, device, executor,
    tasks, finished_before, finished, failed, retried, dense_bytes, stored_bytes
from runs
order by run, started_at, invocation
