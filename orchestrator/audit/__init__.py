"""A look at a checkpoint before it is compressed."""
