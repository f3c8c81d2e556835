"""Who runs the items: this process, or actors."""
