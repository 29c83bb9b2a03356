"""Sections of the page on language models: what gets more out of the same replay, budgets, and slow weights."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from scripts.common.spread import Spread
from scripts.common.tables import markdown_table
from scripts.llm.data import LENGTH
from scripts.llm.plan import BANDIT, BASE, BUDGET, BUDGET_BOTH, JOINT, LANGUAGES, NEED, RISING, SIZES, UNIFORM
from scripts.llm.results import (
    Row,
    budget_outcome,
    cost_on_new,
    fixed_ratio,
    gap_closed,
    losses,
    mixture_seeds,
    percent,
    select,
    worst_forgetting,
)

__all__ = [
    "BY_LOSS",
    "against_fixed",
    "budgets",
    "mixtures",
    "more_for_the_same",
    "seen_before",
    "slow_weights",
    "spaced",
    "tried",
]


def against_fixed(rows: Sequence[Row]) -> str:
    """Which ways to replay keep more English than fixed ratios that end at no higher a loss on French."""
    base = select(rows, variant=BASE, after="french")
    arms = sorted({row["arm"] for row in base} - {JOINT}, key=float)
    line = [end for arm in arms if (end := _new_and_old(base, arm)) is not None]
    ways = {f"{arm} % with {RISING}": _new_and_old(select(rows, variant=RISING), arm) for arm in ("5", "25")}
    ways |= {name: _new_and_old(select(rows, variant=name), "budget") for name in (BUDGET, BUDGET_BOTH)}
    below = [name for name, end in ways.items() if end is not None and not _reached(end, line)]
    found = f"Below the line: {', '.join(below)}." if below else "So far nothing beats a higher fixed ratio."
    return (
        f"{found} A higher ratio costs no more compute here. The ways below get more out of as many old rows. They are "
        "for jobs that cannot replay more of them.\n"
    )


def _new_and_old(rows: Sequence[Row], arm: str) -> tuple[float, float] | None:
    """Mean losses on French and English after French."""
    new, old = (losses(rows, arm, "french", language) for language in ("french", "english"))
    return None if new is None or old is None else (new.mean, old.mean)


def _reached(end: tuple[float, float], line: Sequence[tuple[float, float]]) -> bool:
    """Whether some mixture of two neighbours of the line is as good on both languages."""
    shares = [number / 100 for number in range(101)]
    between = ([s * a + (1 - s) * b for a, b in zip(*pair, strict=True)] for pair in pairwise(line) for s in shares)
    return any(new <= end[0] and old <= end[1] for new, old in between)


def more_for_the_same(rows: Sequence[Row]) -> list[str]:
    """The same share of rows: as they come, and where the ratio rises and each counts more."""
    lines = [
        line
        for arm in ("5", "25")
        for name, variant in (("a constant ratio", BASE), (RISING, RISING))
        if (line := _share_line(arm, name, select(rows, variant=variant)))
    ]
    if not select(rows, variant=RISING):
        return []
    return [
        "## More out of the same rows",
        "Old rows count most at the end of a phase, when the learning rate falls. So let the ratio rise from 0 to "
        "twice what it is in the mean, and let each replayed row count for four. You replay as many rows as with a "
        "constant ratio. This is the block for 5 %:\n",
        '```json\n{"ratio": 0.0, "ratio_schedule": {"to": 0.1, "steps": 3000}, "strategy": {"loss_weight": 4}}\n```\n',
        markdown_table(
            ["replay", "", "English", "French", "gap closed, English", "cost on French", "seeds"],
            lines,
        ),
        "The weight was chosen with 5 % on a seed that is not in the table.\n",
    ]


def bandit(rows: Sequence[Row]) -> list[str]:
    """How a bandit did, seed by seed, against a mixture by need."""
    ends = [
        (seed, *(worst_forgetting(rows, one, seed) for one in (BANDIT, NEED))) for seed in range(SIZES["full"].seeds)
    ]
    told = [
        f"With seed {seed} the worst rise is {by_bandit:.3f} by the bandit, and {by_need:.3f} by need."
        for seed, by_bandit, by_need in ends
        if by_bandit is not None and by_need is not None
    ]
    if not told:
        return []
    return [
        "A bandit may do as well: EXP3 (Auer et al., 2002), with the reward that `forgetting` goes by. It is told "
        f"which languages are old, which `forgetting` finds out. {' '.join(told)} The two differ by less than "
        "the seeds do. So there is no key for it, and `scripts/llm/bandit.py` is a callback that you can take.\n"
    ]


def mixtures(rows: Sequence[Row]) -> list[str]:
    """How far both old languages are forgotten under different mixtures of them."""
    seeds, lines = mixture_seeds(rows), list[list[str]]()
    names = {UNIFORM: "as they are stored", BASE: "in equal shares", NEED: "by need", BANDIT: "by a bandit"}
    for variant, name in names.items():
        worst = {seed: rise for seed in seeds if (rise := worst_forgetting(rows, variant, seed)) is not None}
        ends = [row for row in select(rows, variant=variant, arm="5", after=LANGUAGES[2]) if row["seed"] in worst]
        if worst:
            means = [Spread.of([row[language] for row in ends]).text() for language in LANGUAGES]
            lines.append([name, *means, Spread.of(list(worst.values())).text(), str(len(worst))])
    if len(lines) < 2:
        return []
    return [
        "## Mixtures of old languages",
        "German with 5 % replay. The old rows come as they are stored (`uniform`), in equal shares of both languages, "
        "or [by need](../guides/monitoring.md#mixture-by-need) (`forgetting`). The worst rise is by how much the loss "
        "on the language that lost most has risen since the end of its own phase.\n",
        markdown_table(["rows", *LANGUAGES, "worst rise", "seeds"], lines),
        *bandit(rows),
    ]


def _share_line(arm: str, name: str, rows: Sequence[Row]) -> list[str]:
    """One way to replay a share; empty where it was not run."""
    closed, cost = gap_closed(rows, arm), cost_on_new(rows, arm)
    if closed is None or cost is None:
        return []
    ends = [losses(rows, arm, "french", language) for language in ("english", "french")]
    of_losses = ["" if end is None else end.text() for end in ends]
    seeds = len(select(rows, arm=arm, after="french"))
    return [f"{arm} %", name, *of_losses, percent(closed), percent(cost), str(seeds)]


def budgets(rows: Sequence[Row]) -> list[str]:
    """How well a budget was held, and with how much replay."""
    controlled = [row for name in (BUDGET, BUDGET_BOTH) for row in select(rows, variant=name, arm="budget")]
    if not controlled:
        return []
    lines = []
    for row in controlled:
        by = "`both`" if row["variant"] == BUDGET_BOTH else "`ratio`"
        replayed, rise_seen = budget_outcome(row)
        (before,) = select(rows, variant=BASE, arm="english", seed=row["seed"])
        rise = row["english"] / before["english"] - 1
        cells = [f"{100 * rise_seen:.1f} %", f"{100 * rise:.1f} %", f"{100 * replayed:.0f} %"]
        fixed = fixed_ratio(rows, row["english"])
        cells += ["" if fixed is None else f"{100 * fixed:.0f} %", f"{row['french']:.3f}"]
        lines.append([by, str(row["seed"]), *cells])
    heads = ["by", "seed", "rise, replayed rows", "rise, held out", "replayed", "fixed ratio with that loss", "French"]
    return [
        "## A forgetting budget",
        "French with [a budget of 2 %](../guides/monitoring.md#a-forgetting-budget) in place of a ratio. The first "
        "rise is what the controller sees at the end of the phase, the second that of the held-out loss. The *fixed "
        "ratio* is the one that ends at the same loss on English, between the ratios of the table above. *By* is what "
        "the controller moves: with `both` it is the weight of a replayed row as well.\n",
        markdown_table(heads, lines),
        "The controller sees stored rows, which the model was trained on. On held-out text the loss rises more. And it "
        "holds the budget from the first step on. There the learning rate is high and forgetting is fast, so it asks "
        "for the highest ratio. Rows that are replayed so early are worth little at the end. If the end is all that "
        "counts for you, let the ratio rise instead, as above.\n",
        *([BY_BOTH] if any(row["variant"] == BUDGET_BOTH for row in controlled) else []),
    ]


BY_BOTH = "With `both`, fewer rows are replayed and each counts for more. That costs more of French.\n"


def seen_before(draws: float, rows: float) -> float:
    """The share of uniform draws from so many rows that bring a row which came before."""
    distinct: float = rows * (1 - (1 - 1 / rows) ** draws)
    return 1 - distinct / draws


def spaced(rows: Sequence[Row]) -> list[str]:
    """How often a replayed row comes again, which is all that spaced repetition could place better."""
    french = [row for row in select(rows, variant=BASE, seed=0, after="french") if row["ratio"] >= 0.05]
    english = select(rows, variant=BASE, seed=0, arm="english")
    if not french or not english:
        return []
    stored = english[0]["tokens"] / LENGTH / english[0]["epochs"]
    lines = []
    for row in french:
        draws = row["ratio"] * row["tokens"] / LENGTH
        lines.append([f"{row['arm']} %", f"{draws:,.0f}", f"{100 * seen_before(draws, stored):.0f} %"])
    return [
        "## Spaced repetition",
        "It replays a row when it is about to be forgotten, so it can only place the rows that come again. Draws are "
        f"uniform over {stored:,.0f} stored rows. This is how many rows of a phase are expected to be no news:\n",
        markdown_table(["replay", "rows replayed", "of these, again"], lines),
        "At small ratios there is next to nothing to space. So there is no key for it.\n",
    ]


TRIED_TEXT = """\
This trains all of them but two: for a weight of 8, and for replay from the middle on, change the variant in
`scripts/llm/plan.py`. A weight of 8 keeps no more than one of 4, and costs more. Replay that comes late
keeps less: what is forgotten by then is not learnt again in time.
"""


def tried(report: dict[str, Any]) -> list[str]:
    """What was tried on a seed of its own, to choose the settings of the variants."""
    lines = [
        [row["arm"], f"{row['english']:.3f}", f"{row['french']:.3f}", f"{100 * row['replayed']:.1f} %"]
        for row in report["rows"]
    ]
    told = report["summary"]
    return [
        "## Tried on another seed",
        f"Settings are chosen on seed {told['seed']:.0f}, of which nothing else is reported. English was at "
        f"{told['english']:.3f} before French:\n",
        markdown_table(["arm", "English", "French", "replayed"], lines),
        "```\npython -m scripts.llm.train --size full --first-seed 9 --seeds 1 --ratios 5 --no-german\n```\n",
        TRIED_TEXT,
        "The budget of 2 % asked for the highest ratio, 0.5, until the learning rate fell, and ended at "
        f"{told['ratio_at_end']:.2f}. The loss on replayed rows had risen by {100 * told['rise_at_end']:.1f} % then, "
        f"over a window of {told['window']:.0f} rows. The held-out loss was below what it was before. So short a "
        "window is noisy beside a budget of 2 %: the default is 1,024.\n",
        "With that window, and `by: both`, a row counted fourfold from early on. That took fewer rows, kept less and "
        f"cost more on French. The loss had risen by {100 * told['both_rise_at_end']:.1f} % at the end, with a ratio "
        f"of {told['both_ratio_at_end']:.2f} that was still falling: few rows a step make the window a long one. So "
        "`by` is `ratio` unless you say otherwise.\n",
    ]


BY_LOSS = """
Rows with a high loss are worth no more than others here, neither to keep (`policy: score`) nor to draw (`weights:
score`): the differences are smaller than those of the seeds. For the draws the buffer keeps English alone
(`scripts/llm/first_language.py`).
"""


def slow_weights(report: dict[str, Any]) -> list[str]:
    """Moving averages of the weights beside a phase."""
    lines = [[row["weights"], f"{row['english']:.3f}", f"{row['french']:.3f}"] for row in report["rows"]]
    told, (trained,) = report["summary"], select(report["rows"], weights="as trained")
    (average,) = select(report["rows"], weights="average over 100 steps")
    better = [trained[language] - average[language] for language in ("english", "french")]
    return [
        "## Slow weights",
        "Moving averages of the weights, beside the training, and points on the line back to the English weights, as "
        f"Reptile goes. One seed ({told['seed']:.0f}), 5 % replay that rises, each row counting for "
        f"{told['weight']:.0f}:\n",
        markdown_table(["weights", "English", "French"], lines),
        f"An average over 100 steps is better by {better[0]:.3f} and {better[1]:.3f}. Longer ones and points further "
        "back lose more on French than replay does for the same gain on English. So there is no key for it.\n",
        "```\npython -m scripts.llm.slow_weights --seed 9\n```\n",
    ]
