"""Small complete jobs to read and to start from."""
