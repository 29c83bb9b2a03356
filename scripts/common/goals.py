"""Goals of a results page: figures of a report's summary and the bounds they are held against."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Goal"]


@dataclass(frozen=True)
class Goal:
    """A number of the summary, and where it should be."""

    key: str
    meaning: str
    bound: float
    at_most: bool = False
    above: bool = False  # the bound itself is not enough

    def line(self, measured: float, quartiles: str = "") -> list[str]:
        """Meaning, bound, what was measured, and by how much it falls short."""
        short = measured - self.bound if self.at_most else self.bound - measured
        verdict = "met" if short < 0 or (short == 0 and not self.above) else f"short by {short:.3f}"
        return [
            f"`{self.key}`: {self.meaning}",
            f"{'≤' if self.at_most else '>' if self.above else '≥'} {self.bound:g}",
            f"{measured:.3f}{quartiles}",
            verdict,
        ]
