"""The README and the guides: examples run as they stand, and files that they name exist."""
