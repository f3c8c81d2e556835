"""The plan: tasks, byte budgets, time."""
