"""One module each, in one process or on a few ranks; a folder for each wing of the package."""
