"""Real trainers on a tiny model: its data, the commands, and a witness in every process that trains."""

from __future__ import annotations
