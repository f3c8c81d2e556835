-- metrics before and after: the latest of the dense and of the compressed model
select
    run,
    task,
    task_version,
    metric,
    answer_filter,
    fewshot,
    dtype,
    settings,
    arg_max(value, time) filter (where not compressed) as before,
    arg_max(value, time) filter (where compressed) as after,
    after - before as change,
    arg_max(stderr, time) filter (where compressed) as stderr_after,
    bool_or(higher_is_better) as higher_is_better
from evaluations
group by run, task, task_version, metric, answer_filter, fewshot, dtype, settings
order by run, task, task_version, metric, answer_filter, fewshot, dtype, settings
