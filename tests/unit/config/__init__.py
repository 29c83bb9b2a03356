"""The `rehearsal` section: values, defaults, sources, and what is refused."""
