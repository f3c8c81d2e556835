-- what took the time: worker seconds of each stage, of the curves and of the groups
select
    run,
    pass,
    replace(stage, 'seconds_', '') as stage,
    count(*) as tasks,
    sum(seconds_of) as seconds,
    max(seconds_of) as longest,
    sum(seconds_of) / nullif(sum(sum(seconds_of)) over (partition by run), 0) as share
from (unpivot finished_tasks on columns('seconds_.*') into name stage value seconds_of)
group by run, pass, stage
order by run, seconds desc, pass, stage
