"""Training after compression."""
