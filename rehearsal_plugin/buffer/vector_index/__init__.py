"""Nearest-neighbour search over the rows of one rank, by their embeddings."""

from __future__ import annotations
