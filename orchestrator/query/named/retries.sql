-- retried attempts, interrupted ones too, and why they ended
with
    ordered as (
        select *, lead(kind) over (partition by run, task_id order by time) as following
        from events
    )
select
    run,
    time,
    layer,
    block,
    task_id,
    attempt,
    case when kind = 'started' then 'Interrupted' else error_type end as error_type,
    case
        when kind = 'started'
        then 'an earlier call ended before it was finished, or its result was damaged since'
        else message
    end as message,
    worker,
    node
from ordered
where kind = 'retried' or (kind in ('started', 'failed') and following = 'started')
order by run, time, task_id
