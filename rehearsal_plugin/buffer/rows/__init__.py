"""A row: the bytes of one sample, how it is laid out, and the memory it passes through."""

from __future__ import annotations
