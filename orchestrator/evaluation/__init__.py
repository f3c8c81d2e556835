"""Perplexity of a text and tasks of lm-eval, on a pool of actors."""
