"""What the doctor finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding", "fine", "problem", "warning"]

Level = Literal["fine", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One fact about the machine or the installation.

    Attributes:
        topic: What it is about, in a word or two.
        level: `problem` where a job fails, `warning` where it may or where it is slower.
        text: The fact.
        cure: What to do about it; empty where it is fine.
    """

    topic: str
    level: Level
    text: str
    cure: str = ""


def fine(topic: str, text: str) -> Finding:
    """A finding that needs nothing."""
    return Finding(topic, "fine", text)


def warning(topic: str, text: str, cure: str) -> Finding:
    """A finding that a job can live with."""
    return Finding(topic, "warning", text, cure)


def problem(topic: str, text: str, cure: str) -> Finding:
    """A finding that a job cannot live with."""
    return Finding(topic, "problem", text, cure)
