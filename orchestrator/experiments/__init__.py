"""Several sizes and several methods, compared; speed."""
