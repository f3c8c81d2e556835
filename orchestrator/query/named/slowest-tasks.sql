-- the 20 tasks of each run that took longest, with the seconds of their stages
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
    pass,
    layer,
    block,
    seconds,
    seconds_read as read,
    seconds_stage1 as stage1,
    seconds_rank_search as rank_search,
    seconds_stage2 as stage2,
    seconds_error as error,
    seconds_write as write,
    worker,
    attempt
from timed
qualify row_number() over (partition by run order by seconds desc, pass, layer, block) <= 20
order by run, seconds desc, pass, layer, block
