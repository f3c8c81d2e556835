"""Views over the manifest's tables, for the built-in queries and the users' own."""

VIEWS = {
    "current": """
        -- Where a group was encoded twice, the later encoding is the group's.
        from groups
        qualify row_number() over (
            partition by run, block order by started_at desc nulls last, task_id desc
        ) = 1""",
    "current_slices": "from slices semi join current using (run, task_id)",
    "finished_tasks": """
        -- What belongs to a curve's task stands in each of its rows.
        select
            *,
            list_sum([
                seconds_read, seconds_stage1, seconds_rank_search, seconds_stage2, seconds_error,
                seconds_write
            ]) as seconds
        from (
            select
                run, task_id, 'group' as pass, layer, block, worker, node, device, attempt,
                started_at, peak_memory_bytes, seconds_read, seconds_stage1, seconds_rank_search,
                seconds_stage2, seconds_error, seconds_write
            from groups
            union all
            select distinct
                run, task_id, 'curve', layer, block, worker, node, device, attempt,
                started_at, peak_memory_bytes, seconds_read, seconds_stage1, seconds_rank_search,
                seconds_stage2, seconds_error, seconds_write
            from curves
        )""",
}
"""Name of each view -> its SELECT statement, which may use those before it."""
