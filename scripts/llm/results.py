"""Results of the recipe: shares of the gap, costs, and their spread over the seeds.

A row of the report is one training::

    {"variant": "base", "seed": 0, "arm": "5", "learns": "french", "after": "french", "steps": 3000, "ratio": 0.05,
     "english": 3.1, "french": 2.9, "german": 6.0, "curve": [...], "seconds": 600.0, ...}

`after` is the last language of the course so far. The union of a course has the arm "joint".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

from scripts.common.spread import Spread
from scripts.llm.data import LENGTH
from scripts.llm.plan import BANDIT, BASE, BUDGET, BUDGET_BOTH, BUDGETED, JOINT, LANGUAGES, NEED, RISING, UNIFORM

__all__ = [
    "LITERATURE",
    "Row",
    "budget_outcome",
    "cost_on_new",
    "fixed_ratio",
    "gap_closed",
    "losses",
    "mixture_seeds",
    "percent",
    "seeds_of",
    "select",
    "summarise",
    "table",
    "worst_forgetting",
]

Row: TypeAlias = dict[str, Any]

OWN_PHASES = {"english": "english", "5": "french"}
"""The arm and the phase that each old language was learnt in last, of the course with 5 % replay."""

LITERATURE = {"1": 0.56, "5": 0.76, "25": 0.95, "50": 1.02}
"""Shares of the gap in Ibrahim et al. (2024), 405 M parameters, English then German, by percentage of replay."""


def select(rows: Iterable[Row], **wanted: object) -> list[Row]:
    """The rows that have these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def seeds_of(rows: Iterable[Row], arms: Sequence[str], after: str) -> list[int]:
    """The seeds for which all of these arms came to the end of a phase."""
    seeds = [{row["seed"] for row in select(rows, arm=arm, after=after)} for arm in arms]
    return sorted(set.intersection(*seeds)) if seeds else []


def losses(rows: Sequence[Row], arm: str, after: str, language: str) -> Spread | None:
    """Held-out loss of a language in nats a token; None where the arm was not trained."""
    values = [row[language] for row in select(rows, arm=arm, after=after)]
    return Spread.of(values) if values else None


def gap_closed(rows: Sequence[Row], arm: str, after: str = "french", old: str = "english") -> Spread | None:
    """The share of the gap between no replay and the union that an arm closes on an old language, seed by seed."""
    seeds = seeds_of(rows, ("0", arm, JOINT), after)
    if not seeds:
        return None
    shares = []
    for seed in seeds:
        without, with_, union = (_one(rows, one, after, seed)[old] for one in ("0", arm, JOINT))
        shares.append((without - with_) / (without - union))
    return Spread.of(shares)


def cost_on_new(rows: Sequence[Row], arm: str, after: str = "french") -> Spread | None:
    """By how much an arm's loss on the new language is above that without replay, as a share of it."""
    seeds = seeds_of(rows, ("0", arm), after)
    if not seeds:
        return None
    return Spread.of([_one(rows, arm, after, s)[after] / _one(rows, "0", after, s)[after] - 1 for s in seeds])


def summarise(rows: Sequence[Row], ratios: Iterable[float]) -> dict[str, float]:
    """The numbers of the report: means over the seeds, and `_sd` beside them where there are several.

    `english_gain_last_tenth` is by how much the loss on English still falls in the last tenth of phase one, as a
    share of it.
    """
    base = select(rows, variant=BASE)
    summary: dict[str, float] = {"seeds": len(seeds_of(base, ("0", "5", JOINT), "french"))}
    for arm in (f"{ratio:g}" for ratio in ratios if ratio):
        summary |= flat(f"gap_closed_{arm}", gap_closed(base, arm))
        summary |= flat(f"cost_on_new_{arm}", cost_on_new(base, arm))
    rising = select(rows, variant=RISING)
    for arm in ("5", "25"):
        summary |= flat(f"gap_closed_{arm}_rising", gap_closed(rising, arm))
        summary |= flat(f"cost_on_new_{arm}_rising", cost_on_new(rising, arm))
    summary |= budget_figures(rows) | mixture_figures(rows)
    gains = [gain(row["curve"]) for row in select(base, arm="english")]
    if gains:
        summary["english_gain_last_tenth"] = sum(gains) / len(gains)
    return summary


def worst_forgetting(rows: Sequence[Row], variant: str, seed: int) -> float | None:
    """By how many nats the old language that lost most lies above the end of its own phase, after German with 5 %."""
    own = [select(rows, variant=BASE, seed=seed, arm=arm, after=after) for arm, after in OWN_PHASES.items()]
    last = select(rows, variant=variant, seed=seed, arm="5", after=LANGUAGES[2])
    if not last or not all(own):
        return None
    rises = [float(last[0][row["after"]]) - float(row[row["after"]]) for (row,) in own]
    return max(rises)


def mixture_figures(rows: Sequence[Row]) -> dict[str, float]:
    """The worst forgetting of a mixture by need and by a bandit, as a share of that of rows as they are stored."""
    figures: dict[str, float] = {}
    for name, variant in (("worst_domain_vs_uniform", NEED), ("worst_domain_vs_uniform_bandit", BANDIT)):
        pairs = [[worst_forgetting(rows, one, seed) for one in (variant, UNIFORM)] for seed in mixture_seeds(rows)]
        shares = [mixed / uniform for mixed, uniform in pairs if mixed is not None and uniform]
        figures |= flat(name, Spread.of(shares)) if shares else {}
    return figures


def mixture_seeds(rows: Sequence[Row]) -> list[int]:
    """The seeds in which the worst forgetting is known by need and with rows as they are stored."""
    seeds = sorted({row["seed"] for row in select(rows, variant=NEED)})
    return [s for s in seeds if None not in [worst_forgetting(rows, variant, s) for variant in (NEED, UNIFORM)]]


def budget_figures(rows: Sequence[Row]) -> dict[str, float]:
    """How far the loss that the controller sees ends from its budget, and its rows against those of a fixed ratio."""
    figures: dict[str, float] = {}
    for variant, suffix in ((BUDGET, ""), (BUDGET_BOTH, "_both")):
        errors, shares = [], []
        for row in select(rows, variant=variant, arm="budget"):
            replayed, rise = budget_outcome(row)
            errors.append(abs(rise / BUDGETED - 1))
            fixed = fixed_ratio(rows, row["english"])
            shares += [] if fixed is None else [replayed / fixed]
        figures |= flat(f"budget_error{suffix}", Spread.of(errors)) if errors else {}
        figures |= flat(f"budget_vs_fixed{suffix}", Spread.of(shares)) if shares else {}
    return figures


def budget_outcome(row: Row) -> tuple[float, float]:
    """The share of replayed rows under a budget, and the rise of the loss on them that the controller saw last."""
    told = row["rehearsal"]
    return 2 * told["rows_replayed"] / (row["tokens"] / LENGTH), told["forgetting/0"]  # this rank has half of the rows


def fixed_ratio(rows: Sequence[Row], loss: float) -> float | None:
    """The constant ratio that ends at a loss on English, between those that were run; None beyond them."""
    base = select(rows, variant=BASE, after="french")
    arms = sorted({float(row["arm"]) for row in base if row["arm"].replace(".", "").isdigit()})
    points = [(arm / 100, Spread.of([row["english"] for row in select(base, arm=f"{arm:g}")]).mean) for arm in arms]
    for (low, above), (high, below) in pairwise(points):
        if below <= loss <= above:
            return low + (high - low) * (above - loss) / (above - below)
    return None


def flat(name: str, spread: Spread | None) -> dict[str, float]:
    """Mean and, where there is one, deviation."""
    if spread is None:
        return {}
    return {name: spread.mean} | ({} if spread.deviation is None else {f"{name}_sd": spread.deviation})


def gain(curve: Sequence[dict[str, float]]) -> float:
    """Fall of the loss on English at the last evaluation, as a share of the one before."""
    return 1 - curve[-1]["english"] / curve[-2]["english"] if len(curve) > 1 else 0.0


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Heads and lines of the losses of every arm at the end of every phase, and what they say."""
    lines = []
    for variant, after, arm in dict.fromkeys((row["variant"], row["after"], row["arm"]) for row in rows):
        of_variant = select(rows, variant=variant)
        cells = [losses(of_variant, arm, after, language) for language in LANGUAGES]
        closed, cost = gap_closed(of_variant, arm, after), cost_on_new(of_variant, arm, after)
        shares = ["" if share is None else percent(share) for share in (closed, cost)]
        lines.append([variant, after, arm, *(cell.text() if cell else "" for cell in cells), *shares])
    return ["variant", "after", "arm", *LANGUAGES, "gap closed", "cost on new"], lines


def percent(share: Spread) -> str:
    """`76.1 ± 0.8 %`."""
    deviation = None if share.deviation is None else 100 * share.deviation
    return f"{Spread(100 * share.mean, deviation).text(1)} %"


def _one(rows: Sequence[Row], arm: str, after: str, seed: int) -> Row:
    (row,) = select(rows, arm=arm, after=after, seed=seed)
    return row
