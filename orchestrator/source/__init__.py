"""A checkpoint, local or remote, its tokenizer, and texts."""
