"""Code that runs on an actor: reads tensors, decomposes, evaluates. No Ray in here."""
