-- who did the work: tasks and busy seconds of each worker, and its share of the run's
select
    run,
    worker,
    any_value(node) as node,
    any_value(device) as device,
    count(*) as tasks,
    sum(seconds) as busy_seconds,
    sum(seconds) / nullif(sum(sum(seconds)) over (partition by run), 0) as share,
    min(started_at) as first_started_at,
    max(started_at) as last_started_at
from finished_tasks
group by run, worker
order by run, busy_seconds desc, worker
