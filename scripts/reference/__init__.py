"""Pages of the reference that are built from the code: the config, the command line, the metrics."""
