"""The machine under a worker: devices, memory, failures."""
