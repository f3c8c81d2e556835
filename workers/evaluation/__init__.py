"""Perplexity and tasks of lm-eval on one actor."""
