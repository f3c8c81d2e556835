"""What lives inside a loaded model in place of its linear layers."""
