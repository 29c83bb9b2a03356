"""Trainings of the recipe, and the one that each of them goes on from.

    english ──┬── french, no replay ──── german, no replay
              ├── french, 1 % replay ─── german, 1 % replay
              ├── ...
              └── french, 50 % replay ── german, 50 % replay
    english + french, from scratch, as many steps as both phases           the union, after French
    english + french + german, from scratch, as many steps as all three    the union, after German

A variant changes one thing of it, to see what that does to the share of the gap that replay closes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from scripts.llm import data as llm_data
from scripts.llm.first_language import FIRST_LANGUAGE

__all__ = [
    "BANDIT",
    "BASE",
    "BUDGET",
    "BUDGETED",
    "BUDGET_BOTH",
    "JOINT",
    "LANGUAGES",
    "NEED",
    "RISING",
    "SIZES",
    "SURPRISED",
    "SURPRISING",
    "UNIFORM",
    "Run",
    "Setting",
    "Size",
    "config_of",
    "key_of",
    "plan",
    "variants",
]

ENGLISH, FRENCH, GERMAN = LANGUAGES = tuple(llm_data.LANGUAGES)
JOINT = "joint"
BASE = "base"
RISING = "a ratio that rises, and replayed rows count fourfold"
BUDGET = "a forgetting budget of 2 %"
BUDGET_BOTH = "a forgetting budget of 2 %, by ratio and weight"
BUDGETED = 0.02
SURPRISING = "10 % of English, the rows with the highest loss"
SURPRISED = "rows come more often, the higher their loss is"
NEED = "old languages by need"
UNIFORM = "old languages as they are stored"
BANDIT = "old languages by a bandit"
EXP3 = "exp3"
"""A mixture that is no key: the phase has a callback that reweighs what is replayed."""

BOUNDS: dict[str, Any] = {"min": 0.02, "max": 0.5}
"""Of the ratio under a budget. Steps have eight rows, so a lower one would hardly see any."""


@dataclass(frozen=True)
class Setting:
    """Settings that the trainings of one variant have in common.

    Attributes:
        steps: Optimizer steps of a phase.
        width: Of the model.
        rewarm: Peak of the learning rate in later phases, as a share of that in phase one.
        buffer: Rows in the buffers of all ranks together, as a share of the English training rows; None for the
            config's capacity.
        made_up: Whether the rows to replay come out of the model of phase one, and not out of its data.
        weight: Weight of a replayed row in the loss, against that of a new one.
        rising: Whether the ratio rises in the course of a phase, from 0 to twice what it is in the mean.
        budget: By which part the loss on replayed rows may rise, in place of ratios; None for ratios.
        budget_by: `ratio.by`, what is raised and lowered; None for the ratio.
        seeds: How many seeds it is run with, at most as many as the recipe has.
        ratios: That it is run with, in percent.
        surprising: Whether the buffer of phase one keeps the rows with the highest loss, and is as small from then on.
        surprised: Whether rows are drawn in proportion to their loss.
        mixture: `sampling.weights` where there are several old languages, or `EXP3`; None for equal shares.
        german: Whether German follows French.
    """

    steps: int
    width: int = 128
    rewarm: float = 1.0
    buffer: float | None = None
    made_up: bool = False
    weight: float = 1.0
    rising: bool = False
    budget: float | None = None
    budget_by: str | None = None
    seeds: int = 1
    ratios: tuple[float, ...] = (0.0, 5.0)
    surprising: bool = False
    surprised: bool = False
    mixture: str | None = None
    german: bool = False


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        arm: "english", a percentage of replay, "budget", or "joint".
        seed: Of weights, batches and draws.
        learns: Languages of the new rows.
        old: Languages that are replayed.
        steps: Optimizer steps.
        rate: Peak of the learning rate, as a share of the config's.
        width: Of the model.
        buffer: As in `Setting`.
        after: The training whose model and buffer this one goes on with.
        made_up: As in `Setting`.
        weight: As in `Setting`.
        rising: As in `Setting`.
        budget: As in `Setting`.
        budget_by: As in `Setting`.
        surprising: As in `Setting`.
        surprised: As in `Setting`.
        mixture: As in `Setting`.
    """

    arm: str
    seed: int
    learns: tuple[str, ...]
    old: tuple[str, ...]
    steps: int
    rate: float
    width: int
    buffer: float | None
    after: Run | None
    made_up: bool = False
    weight: float = 1.0
    rising: bool = False
    budget: float | None = None
    budget_by: str | None = None
    surprising: bool = False
    surprised: bool = False
    mixture: str | None = None

    @property
    def name(self) -> str:
        """For a person."""
        how = "a budget" if self.budget is not None else f"{self.arm} % replay"
        replay = f", {how}" if self.old else ""
        return f"seed {self.seed}, {' + '.join(self.learns)}{replay}"

    @property
    def ratio(self) -> float:
        """Share of replayed rows that is asked for; 0 where a budget decides."""
        return float(self.arm) / 100 if self.old and self.budget is None else 0.0


@dataclass(frozen=True)
class Size:
    """A size of the recipe.

    Attributes:
        steps: Of a phase.
        seeds: Number of seeds.
        ratios: In percent.
        german: Whether German follows French.
        variants: Whether the variants are run as well, with the first seed.
    """

    steps: int
    seeds: int
    ratios: tuple[float, ...]
    german: bool
    variants: bool


def variants(steps: int) -> dict[str, Setting]:
    """The settings of every variant; the first is that of the results."""
    base = Setting(steps)
    return {
        BASE: base,
        "learning rate re-warmed to a third": replace(base, rewarm=1 / 3),
        "buffer of 10 % of English": replace(base, buffer=0.1),
        "10 % of English, made up by the model": replace(base, buffer=0.1, made_up=True),
        "replayed rows count threefold": replace(base, weight=3.0),
        RISING: replace(base, weight=4.0, rising=True, seeds=3, ratios=(0.0, 5.0, 25.0)),
        BUDGET: replace(base, budget=BUDGETED, seeds=3),
        BUDGET_BOTH: replace(base, budget=BUDGETED, budget_by="both", seeds=3),
        SURPRISING: replace(base, buffer=0.1, surprising=True),
        SURPRISED: replace(base, surprised=True),
        NEED: replace(base, mixture="forgetting", seeds=3, german=True),
        UNIFORM: replace(base, mixture="uniform", seeds=3, german=True),
        BANDIT: replace(base, mixture=EXP3, seeds=3, german=True),
        "half the steps": replace(base, steps=steps // 2),
        "half the width": replace(base, width=base.width // 2),
    }


SIZES = {
    "small": Size(steps=800, seeds=1, ratios=(0, 5, 25), german=False, variants=False),
    "full": Size(steps=3000, seeds=3, ratios=(0, 1, 5, 25, 50), german=True, variants=True),
}


def plan(setting: Setting, seed: int, ratios: Iterable[float], *, german: bool) -> list[Run]:
    """All trainings of one variant and seed, each behind the one that it goes on from."""
    new = Run(JOINT, seed, (ENGLISH,), (), setting.steps, 1.0, setting.width, None, None)
    plain = english = replace(new, arm=ENGLISH)
    if setting.surprising:
        english = replace(plain, buffer=setting.buffer, surprising=True)
    elif setting.surprised:
        english = replace(plain, surprised=True)
    phases = LANGUAGES[1:] if german else LANGUAGES[1:2]
    runs = [english]
    for arm in (f"{ratio:g}" for ratio in ratios):
        last = english if arm != "0" else plain  # without replay it is all the same what was stored
        for number, language in enumerate(phases, 1):
            arm = "budget" if arm != "0" and setting.budget is not None else arm
            last = Run(arm, seed, (language,), (), setting.steps, setting.rewarm, setting.width, None, last)
            if arm != "0":
                last = replace(last, old=LANGUAGES[:number], buffer=setting.buffer, made_up=setting.made_up)
                last = replace(last, weight=setting.weight, rising=setting.rising, budget=setting.budget)
                last = replace(last, budget_by=setting.budget_by)
                last = replace(last, mixture=setting.mixture if number > 1 else None)
                last = replace(last, surprising=setting.surprising, surprised=setting.surprised)
            runs.append(last)
    unions = (LANGUAGES[: number + 1] for number in range(1, len(phases) + 1))
    return runs + [replace(new, learns=union, steps=len(union) * setting.steps) for union in unions]


def rows_of(share: float, english_rows: int) -> int:
    """Rows of a share of English, at least one for every rank there may be."""
    return max(8, round(share * english_rows))


def key_of(run: Run, config: Mapping[str, Any], ranks: int) -> str:
    """Eight letters that are others as soon as anything is that changes the result."""
    described = asdict(replace(run, after=None)) | {"config": config_of(run, config, 1000, ranks, None), "ranks": ranks}
    for name in (
        "weight",
        "rising",
        "budget",
        "budget_by",
        "surprising",
        "surprised",
        "mixture",
    ):  # the config has them
        del described[name]
    before = None if run.after is None else key_of(run.after, config, ranks)
    text = json.dumps([described, before], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def config_of(
    run: Run, config: Mapping[str, Any], english_rows: int, ranks: int, preload: str | None
) -> dict[str, Any]:
    """The DeepSpeed config of a training, made from that of the recipe.

    Args:
        run: The training.
        config: The recipe's.
        english_rows: Rows to train on of English, which the size of the buffer is a share of.
        ranks: Number of ranks that share them.
        preload: Folder of the rows to begin with; not looked at where nothing is replayed.
    """
    params = config["optimizer"]["params"]
    optimizer = {**config["optimizer"], "params": {**params, "lr": params["lr"] * run.rate}}
    block = {**config["rehearsal"], "ratio": run.ratio, "seed": run.seed}
    if run.old:
        buffer = {**block["buffer"], "preload": preload}
        if run.buffer is not None:
            buffer["capacity"] = rows_of(run.buffer, english_rows) // ranks
        equal = {str(LANGUAGES.index(language)): 1 for language in run.old}
        weights = equal if run.mixture in (None, EXP3) else run.mixture
        block |= {"buffer": buffer, "sampling": {**block["sampling"], "weights": weights}}
        if run.mixture in ("forgetting", EXP3):
            block["losses_every"] = 1
        if run.weight != 1:
            block["strategy"] = {"loss_weight": run.weight}
        if run.rising:
            block |= {"ratio": 0.0, "ratio_schedule": {"to": 2 * run.ratio, "steps": run.steps}}
        if run.budget is not None:
            by = {} if run.budget_by is None else {"by": run.budget_by}
            block |= {"ratio": {"budget": run.budget, **BOUNDS, **by}, "losses_every": 1}
    elif run.arm == ENGLISH:
        block["sampling"] = {**block["sampling"], "weights": "uniform"}  # there is no old language yet
        if run.surprising and run.buffer is not None:
            capacity = rows_of(run.buffer, english_rows) // ranks
            block["buffer"] = {**block["buffer"], "capacity": capacity, "policy": "score", "score_by": "loss"}
    else:
        block = {"enabled": False}
    if run.surprised:
        block["buffer"] = {**block["buffer"], "policy": FIRST_LANGUAGE, "score_by": "loss"}
        block["sampling"] = {**block["sampling"], "weights": "score"}
    return {**config, "optimizer": optimizer, "rehearsal": block}
