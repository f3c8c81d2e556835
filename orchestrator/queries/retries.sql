-- attempts that were followed by another, and why they ended
select run, "at", layer, "group", task_id, attempt, error_type, message, worker, node
from events
where kind = 'retried'
order by run, "at", task_id
