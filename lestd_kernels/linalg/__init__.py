"""Stage I, Stage II, metrics and factorizations of matrices."""
