"""What a decomposition is: its tensors, its description, how it is applied."""
