"""Headers, tensors and digests of safetensors files."""
