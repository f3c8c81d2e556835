"""Executors: this process, or actors of a Ray cluster."""
