"""A run as one page, as Markdown, and beside another run."""
