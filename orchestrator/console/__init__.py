"""The console: progress, logs, tables, plots."""
