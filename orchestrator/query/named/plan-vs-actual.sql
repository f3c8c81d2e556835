-- what was planned and what came of it: tasks, bytes, memory, disk, seconds and squared error
with
    calls as (
        select distinct on (run) * from runs order by run, started_at desc, invocation desc
    ),
    -- Calls that were not asked to calibrate know of none.
    calibrated as (
        select run, last(planned_seconds order by started_at, invocation) as planned_seconds
        from runs
        where planned_seconds is not null
        group by run
    ),
    worked as (
        select
            run,
            max(peak_memory_bytes) as peak_memory_bytes,
            sum(list_sum([
                seconds_stage1, seconds_rank_search, seconds_stage2, seconds_error
            ])) as seconds
        from finished_tasks
        group by run
    ),
    actual as (
        select
            run,
            count(*) as tasks,
            sum(byte_budget) as byte_budget,
            sum(stored_bytes) as stored_bytes,
            -- Those that the budget is for.
            sum(if(size = 'memory', memory_bytes, stored_bytes)) as counted_bytes,
            sum(payload_bytes) as payload_bytes,
            sum(metric_squared_error) as squared_error
        from current
        group by run
    ),
    points as (
        select
            run, layer, block, byte_budget, predicted_squared_error as squared_error,
            lead(byte_budget) over curve - byte_budget as step,
            lead(predicted_squared_error) over curve - predicted_squared_error as change
        from curves
        window curve as (partition by run, layer, block order by byte_budget)
    ),
    -- Of all groups or of none: on its curve, between two points where the budget lies there.
    predicted as (
        select
            current.run,
            case
                when count(*) = count(points.squared_error)
                then sum(
                    points.squared_error
                    + coalesce((current.byte_budget - points.byte_budget) / step * change, 0)
                )
            end as squared_error
        from current
        asof left join points
            on current.run = points.run
            and current.layer = points.layer
            and current.block = points.block
            and current.byte_budget >= points.byte_budget
        group by current.run
    ),
    known as (
        select
            run,
            calls.tasks as planned_tasks,
            coalesce(actual.tasks, 0) as tasks,
            actual.byte_budget as finished_budget,
            actual.counted_bytes as finished_bytes,
            calls.byte_budget,
            calls.stored_bytes + actual.counted_bytes - actual.stored_bytes as stored_bytes,
            planned_worker_memory_bytes,
            worked.peak_memory_bytes,
            planned_disk_bytes,
            actual.payload_bytes,
            calibrated.planned_seconds,
            worked.seconds,
            predicted.squared_error as predicted_squared_error,
            actual.squared_error
        from calls
        full join worked using (run)
        left join actual using (run)
        left join calibrated using (run)
        left join predicted using (run)
    ),
    quantities(run, place, quantity, planned, actual) as (
        select run, 1, 'groups', planned_tasks::double, tasks::double from known
        union all
        select run, 2, 'bytes of the finished groups', finished_budget, finished_bytes from known
        union all
        select run, 3, 'bytes of all groups', byte_budget, stored_bytes from known
        union all
        select run, 4, 'peak memory of a worker, bytes', planned_worker_memory_bytes,
            peak_memory_bytes from known
        union all
        select run, 5, 'disk of the run, bytes', planned_disk_bytes, payload_bytes from known
        union all
        select run, 6, 'decomposing, seconds', planned_seconds, seconds from known
        union all
        select run, 7, 'squared error in the run''s metric', predicted_squared_error, squared_error from known
    )
select run, quantity, planned, actual, actual / nullif(planned, 0) as ratio
from quantities
order by run, place
