"""The driver: plans, schedules, records, assembles."""
