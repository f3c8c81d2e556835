-- what took the time: worker seconds of each stage, of the curves and of the groups
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
    stages as (
        unpivot tasks
        on seconds_read, seconds_stage1, seconds_rank_search, seconds_stage2, seconds_error,
           seconds_write
        into name stage value seconds
    )
select
    run,
    pass,
    replace(stage, 'seconds_', '') as stage,
    count(*) as tasks,
    sum(seconds) as seconds,
    max(seconds) as longest,
    sum(seconds) / nullif(sum(sum(seconds)) over (partition by run), 0) as share
from stages
group by run, pass, stage
order by run, seconds desc, pass, stage
