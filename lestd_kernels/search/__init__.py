"""Ranks and non-zeros of least error inside a byte budget."""
