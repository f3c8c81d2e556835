-- who did the work: tasks and busy seconds of each worker, and its share of the run's
with
    tasks as (
        select
            run, task_id, 'group' as pass, layer, block, worker, node, device, attempt, started_at,
            seconds_read, seconds_stage1, seconds_rank_search, seconds_stage2, seconds_error,
            seconds_write
        from groups
        union all
        select
            run, task_id, 'curve', layer, block, worker, node, device, attempt, started_at,
            seconds_read, seconds_stage1, seconds_rank_search, seconds_stage2, seconds_error,
            seconds_write
        from (select distinct on (run, task_id) * from curves order by run, task_id, byte_budget)
    ),
    timed as (
        select
            *,
            coalesce(seconds_read, 0) + coalesce(seconds_stage1, 0)
            + coalesce(seconds_rank_search, 0) + coalesce(seconds_stage2, 0)
            + coalesce(seconds_error, 0) + coalesce(seconds_write, 0) as seconds
        from tasks
    )
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
from timed
group by run, worker
order by run, busy_seconds desc, worker
