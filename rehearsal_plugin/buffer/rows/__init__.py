"""Rows: the bytes of one sample each, their layout, and the memory that they pass through."""

from __future__ import annotations
