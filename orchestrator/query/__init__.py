"""The manifest in SQL."""
