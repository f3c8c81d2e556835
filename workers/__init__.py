"""What runs on an actor: reads tensors, decomposes, evaluates. No ray in here."""
