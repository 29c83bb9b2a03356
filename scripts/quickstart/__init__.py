"""The first job to run: Python source, then C++ headers."""
