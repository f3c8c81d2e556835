"""Diagnostics and predictions, without compressing."""
