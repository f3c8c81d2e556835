-- tasks that failed for good, why, and whether a later call finished them
with
    finished as (
        select run, task_id from groups
        union
        select run, task_id from curves
    )
select
    run, time, layer, block, task_id, attempt, error_type, message, worker, node,
    finished.task_id is not null as finished_since
from events
left join finished using (run, task_id)
where kind = 'failed'
order by run, time, task_id
