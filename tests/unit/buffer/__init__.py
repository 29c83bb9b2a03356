"""The buffer of one rank: rows, storage, policies, scores, duplicates and the vector index."""
