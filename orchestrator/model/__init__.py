"""Directories that are models: assembled, read, verified, exported, pushed."""
