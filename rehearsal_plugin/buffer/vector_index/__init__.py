"""The rows of one rank by their embedding: which of them are nearest to a vector."""

from __future__ import annotations
