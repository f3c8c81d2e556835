"""A checkpoint wherever it lies, its tokenizer, and texts."""
