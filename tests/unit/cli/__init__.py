"""The command `rehearsal`."""
