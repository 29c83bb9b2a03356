"""Results of the recipe of skills: right answers and perplexities by arm, and their spread over the seeds.

A row of the report is one training::

    {"seed": 0, "learns": "french", "trained": "all parameters", "arm": "5 %", "steps": 60, "skill": 0.98,
     "french": 40.0, "english": 60.0, "curve": [{"step": 0, "skill": 1.0, ...}, ...], "seconds": 300.0, ...}

`skill` is the share of held-out prompts that are answered right to the letter; the texts are perplexities.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from scripts.common.spread import Spread
from scripts.llm.results import Row, flat, select
from scripts.llm.skills_data import TEXTS
from scripts.llm.skills_plan import FULL

__all__ = ["Row", "arms_of", "in_full", "replayed", "spread_of", "summarise", "table"]

NAMES = {"no replay": "none", "1 %": "1", "5 %": "5", "10 %": "10", "5 %, made up": "5_made_up", "budget": "budget"}


def arms_of(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """What was trained, and the arm, of all trainings in French."""
    return list(dict.fromkeys((row["trained"], row["arm"]) for row in select(rows, learns="french")))


def in_full(rows: Sequence[Row]) -> list[Row]:
    """The trainings but those in French that had fewer steps than others."""
    longest = max((row["steps"] for row in select(rows, learns="french")), default=0)
    return [row for row in rows if row["learns"] == "orders" or row["steps"] == longest]


def spread_of(rows: Iterable[Row], name: str, **wanted: object) -> Spread | None:
    """A number at the end of the trainings that have these values; None where there are none."""
    values = [float(row[name]) for row in select(rows, **wanted)]
    return Spread.of(values) if values else None


def replayed(rows: Iterable[Row], **wanted: object) -> Spread | None:
    """Rows that were replayed, on all ranks; None where no rank has a buffer."""
    values = [float(row["rows_replayed"]) for row in select(rows, **wanted) if row.get("rows_replayed") is not None]
    return Spread.of(values) if values else None


def summarise(rows: Sequence[Row]) -> dict[str, float]:
    """The numbers of the report: means over the seeds, and `_sd` beside them where there are several.

    `skill_kept_*` is what is left of the skill after French, as right answers; `skill_kept` is that of 5 % replay
    with all parameters, and `skill_left` that without replay. `*_worst` is the seed that is furthest from the goal.
    """
    full = in_full(rows)
    shorter = [row for row in rows if row not in full]
    orders = select(rows, learns="orders")
    summary: dict[str, float] = {"seeds": len({row["seed"] for row in select(rows, learns="french")})}
    summary |= flat("skill_before", Spread.of([row["curve"][0]["skill"] for row in orders]) if orders else None)
    summary |= flat("skill_learnt", spread_of(orders, "skill"))
    for trained, arm in arms_of(full):
        prefix = "" if trained == FULL else "lora_"
        summary |= flat(f"{prefix}skill_{NAMES[arm]}", spread_of(full, "skill", trained=trained, arm=arm))
    for name, arm, worst in (("skill_kept", "5 %", min), ("skill_left", "no replay", max)):
        skills = [row["skill"] for row in select(full, learns="french", trained=FULL, arm=arm)]
        if skills:
            summary |= {name: Spread.of(skills).mean, f"{name}_worst": worst(skills)}
    return summary | flat("skill_5_fewer_steps", spread_of(shorter, "skill"))


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Heads and lines: the model before and after it learnt the orders, then every arm after French."""
    orders = select(rows, learns="orders")
    before = [row["curve"][0] | {"seed": row["seed"]} for row in orders]
    lines = [line("the model as it comes", before, {}), line("after the orders", orders, {})] if orders else []
    for among in (full := in_full(rows), [row for row in rows if row not in full]):
        for trained, arm in arms_of(among):
            wanted = {"learns": "french", "trained": trained, "arm": arm}
            fewer = "" if among is full else f", {among[0]['steps']} steps"
            lines.append(line(f"{trained}, {arm}{fewer}", among, wanted))
    return ["", "right answers", *(f"perplexity, {text}" for text in TEXTS), "rows replayed", "seeds"], lines


def line(name: str, rows: Sequence[Row], wanted: dict[str, Any]) -> list[str]:
    """One line of the table."""
    skill = spread_of(rows, "skill", **wanted)
    perplexities = [spread_of(rows, text, **wanted) for text in TEXTS]
    count = replayed(rows, **wanted)
    cells = [skill.text() if skill else "", *(one.text(1) if one else "" for one in perplexities)]
    seeds = {row["seed"] for row in select(rows, **wanted)}
    return [name, *cells, "" if count is None else count.text(0), str(len(seeds))]
