"""Decompositions: their tensors, their description, how they are applied."""
