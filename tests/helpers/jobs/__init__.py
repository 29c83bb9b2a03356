"""Training scripts that the launchers run in tests; none of them knows of rehearsal."""
