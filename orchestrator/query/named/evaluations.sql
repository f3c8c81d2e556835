-- metrics before and after: the latest of the dense and of the compressed model
select
    run,
    task,
    task_version,
    metric,
    "filter",
    fewshot,
    dtype,
    settings,
    arg_max(value, "at") filter (where not compressed) as before,
    arg_max(value, "at") filter (where compressed) as after,
    after - before as change,
    arg_max(stderr, "at") filter (where compressed) as stderr_after,
    bool_or(higher_is_better) as higher_is_better
from evaluations
group by run, task, task_version, metric, "filter", fewshot, dtype, settings
order by run, task, task_version, metric, "filter", fewshot, dtype, settings
