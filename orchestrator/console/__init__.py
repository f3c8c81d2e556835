"""What people see while they wait: progress, logs, tables, plots."""
