"""Modules of a loaded model that stand in for its linear layers."""
