"""The run directory: lease, record, fingerprint."""
