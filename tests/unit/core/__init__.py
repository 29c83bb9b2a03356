"""Apportionment, random generators, optional imports and other ground-floor modules."""
