"""Training scripts that launchers run in tests; none of them knows of rehearsal."""
