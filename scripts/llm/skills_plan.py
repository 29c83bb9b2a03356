"""Trainings of the recipe of skills, and the one that each of them goes on from.

    the pretrained model ── orders ──┬── French, no replay
                                     ├── French, 5 % replay
                                     ├── French, 5 % of rows that the model made up itself
                                     ├── ...
                                     └── French with LoRA, no replay, 5 %, 10 %

An arm is a `rehearsal` block, and nothing else differs between them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["ADAPTERS", "ARMS", "FULL", "MADE_UP", "SIZES", "Run", "Size", "config_of", "key_of", "plan"]

ARMS: dict[str, dict[str, Any]] = {
    "no replay": {"enabled": False},
    "1 %": {"ratio": 0.01},
    "5 %": {"ratio": 0.05},
    "10 %": {"ratio": 0.1},
    "budget": {"ratio": {"budget": 0.02, "min": 0.005, "max": 0.5, "window": 32}, "losses_every": 1},
    "5 %, made up": {"ratio": 0.05},
}
"""What each arm changes of the config's block; the last one replays rows of the model's own making."""

FULL, ADAPTERS = "all parameters", "LoRA"
MADE_UP = "5 %, made up"


@dataclass(frozen=True)
class Size:
    """A size of the recipe.

    Attributes:
        steps: Optimizer steps in the orders, and in French.
        seeds: The seeds.
        arms: Arms with all parameters, and with LoRA.
        examinations: In the course of a phase.
        prompts: Held-out prompts of those; all are asked at the end.
        shorter: Steps in French of one more training with 5 % and all parameters; 0 leaves it out.
    """

    steps: tuple[int, int]
    seeds: tuple[int, ...]
    arms: Mapping[str, tuple[str, ...]]
    examinations: int
    prompts: int
    shorter: int = 0


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        learns: "orders" or "french".
        trained: `FULL` or `ADAPTERS`.
        arm: Of `ARMS`; empty where the orders are learnt.
        seed: Of batches, adapters and draws.
        steps: Optimizer steps.
        examinations: In their course.
        prompts: Held-out prompts of those.
        after: The training whose model this one goes on with.
    """

    learns: str
    trained: str
    arm: str
    seed: int
    steps: int
    examinations: int
    prompts: int
    after: Run | None = None

    @property
    def name(self) -> str:
        """For a person."""
        return ", ".join(filter(None, [f"seed {self.seed}", self.learns, self.trained, self.arm]))

    @property
    def made_up(self) -> bool:
        """Whether the rows to replay are of the model's own making."""
        return self.arm == MADE_UP


SIZES = {
    "small": Size((8, 8), (0,), {FULL: ("no replay", "10 %", MADE_UP), ADAPTERS: ("10 %",)}, 2, 4),
    "full": Size((24, 60), (0, 1), {FULL: tuple(ARMS), ADAPTERS: tuple(ARMS)}, 5, 40, shorter=40),
}


def plan(size: Size, seeds: Sequence[int]) -> list[Run]:
    """All trainings, seed by seed, each behind the one that it goes on from; all parameters before LoRA."""
    runs = []
    rest = (size.examinations, size.prompts)
    for trained, arms in size.arms.items():
        for seed in seeds:
            orders = Run("orders", FULL, "", seed, size.steps[0], *rest)
            runs += [orders, *(Run("french", trained, arm, seed, size.steps[1], *rest, orders) for arm in arms)]
            if size.shorter and trained == FULL:
                runs.append(Run("french", FULL, "5 %", seed, size.shorter, *rest, orders))
    return list(dict.fromkeys(runs))


def key_of(run: Run, config: Mapping[str, Any], ranks: int) -> str:
    """Eight letters that are others as soon as anything is that changes the result."""
    before = None if run.after is None else key_of(run.after, config, ranks)
    text = json.dumps([asdict(run), config_of(run, config, None), ranks, before], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def config_of(run: Run, config: Mapping[str, Any], preload: str | None) -> dict[str, Any]:
    """The DeepSpeed config of a training, made from that of the recipe.

    Args:
        run: The training.
        config: The recipe's, with a learning rate for each phase beside the optimizer.
        preload: Folder of the rows to begin with; not looked at where nothing is replayed.
    """
    rates = config["learning_rates"]
    rate = rates["orders" if run.after is None else run.trained]
    optimizer = {**config["optimizer"], "params": {**config["optimizer"]["params"], "lr": rate}}
    rest = {name: value for name, value in config.items() if name != "learning_rates"}
    return {**rest, "optimizer": optimizer, "rehearsal": block_of(run, config["rehearsal"], preload)}


def block_of(run: Run, block: Mapping[str, Any], preload: str | None) -> dict[str, Any]:
    """The `rehearsal` block of a training: learning orders only fills the buffer."""
    if run.after is None:
        return {**block, "ratio": 0, "seed": run.seed, "sampling": {**block["sampling"], "weights": "uniform"}}
    if ARMS[run.arm].get("enabled") is False:
        return {"enabled": False}
    return {**block, "seed": run.seed, "buffer": {**block["buffer"], "preload": preload}, **ARMS[run.arm]}
