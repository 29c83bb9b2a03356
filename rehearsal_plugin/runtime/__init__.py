"""A step of training: rows are staged, asked for, received and joined with the batch."""

from __future__ import annotations
