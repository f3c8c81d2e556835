-- the 20 tasks of each run that took longest, with the seconds of their stages
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
from finished_tasks
qualify row_number() over (partition by run order by seconds desc, pass, layer, block) <= 20
order by run, seconds desc, pass, layer, block
