"""The ratio is met over time, whatever the steps look like."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.integrations.inject.loader import RehearsalLoader
from tests.helpers.ranks import run_ranks

STEPS, WARM_UP, RATIO, NEAR = 600, 10, 0.25, 0.01

PADDING = {"length": 12, "values": {"tokens": 0}}

PATTERNS: dict[str, tuple[tuple[int, ...], ...]] = {
    "alike": ((8,) * 4,),
    "4 4 1 micro-batches": ((8,) * 4, (8,) * 4, (8,)),
    "2 1": ((8,) * 2, (8,)),
    "8 8 8 3": ((8,) * 8, (8,) * 8, (8,) * 8, (8,) * 3),
    "1 4": ((8,), (8,) * 4),
    "1 2 3 4 5": tuple((8,) * count for count in (1, 2, 3, 4, 5)),
    "1 and 4, two steps each": ((8,), (8,), (8,) * 4, (8,) * 4),
    "rows of 1 and 64": ((1,), (1,), (64,)),
    "32 and 1 beside each other": ((32, 1), (1, 32)),
    "sizes and numbers": ((8, 8, 3), (5,), (8, 8, 8, 1)),
    "steps without a batch": ((8, 8), (), (8,), (), ()),
    "single rows": ((1,),),
    "a long step now and then": (*((8,) for _ in range(19)), (8,) * 12),
}
"""Rows of the micro-batches of each step, over and over."""

AMOUNTS: dict[str, dict[str, Any]] = {
    "rows": {},
    "tokens": {"ratio_in": "tokens"},
    "replaced rows": {"mode": "replace"},
    "replaced tokens": {"mode": "replace", "ratio_in": "tokens"},
}


def batch(rows: int, draw: random.Random) -> Tensor:
    lengths = torch.tensor([draw.randint(2, 12) for _ in range(rows)]).reshape(-1, 1)
    return (torch.arange(12) < lengths).long()[:, : int(lengths.max()) if rows else 1]


def met(pattern: Sequence[Sequence[int]], steps: int = STEPS, **keys: Any) -> float:
    """The share of replayed rows or tokens in what the model sees."""
    new = replayed = 0
    draw, in_tokens = random.Random(0), keys.get("ratio_in") == "tokens"
    measure: Callable[[Tensor], int] = (lambda rows: int(rows.sum())) if in_tokens else len
    with Rehearsal({"buffer": {"capacity": 1000}, "padding": PADDING, "ratio": RATIO, **keys}) as rehearsal:
        for step, sizes in zip(range(steps), itertools.cycle(pattern), strict=False):
            for size in sizes:
                before = rehearsal.metrics()["rows_replayed"]
                seen = rehearsal.augment({"tokens": batch(size, draw)})["tokens"]
                first = len(seen) - int(rehearsal.metrics()["rows_replayed"] - before)
                if step >= WARM_UP:
                    new += measure(seen[:first])
                    replayed += measure(seen[first:])
            rehearsal.step()
    return replayed / max(1, new + replayed)


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_ratio_is_met_whatever_the_steps_look_like(pattern: str, amount: str) -> None:
    assert met(PATTERNS[pattern], **AMOUNTS[amount]) == pytest.approx(RATIO, abs=NEAR)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("amount", AMOUNTS)
def test_a_ratio_is_met_with_steps_at_random(seed: int, amount: str) -> None:
    draw = random.Random(seed)
    pattern = [[draw.choice((0, 1, 8, 40)) for _ in range(draw.randint(0, 5))] for _ in range(STEPS)]
    assert met(pattern, **AMOUNTS[amount]) == pytest.approx(RATIO, abs=NEAR)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_micro_batch_gets_the_representatives_in_the_mean(pattern: str) -> None:
    count, rows = 0, 0
    with Rehearsal({"buffer": {"capacity": 1000}, "representatives": 3}) as rehearsal:
        for _, sizes in zip(range(STEPS), itertools.cycle(PATTERNS[pattern]), strict=False):
            for size in sizes:
                seen = len(rehearsal.augment(torch.zeros(size, 2)))
                count, rows = count + 1, rows + seen - size
                assert seen - size <= 5, "no micro-batch grows by much more"
            rehearsal.step()
    assert rows / count == pytest.approx(3, abs=0.1)


def test_a_micro_batch_gets_little_more_than_its_own_part() -> None:
    most: dict[int, int] = {}
    with Rehearsal({"buffer": {"capacity": 1000}, "ratio": RATIO}) as rehearsal:
        for sizes in itertools.islice(itertools.cycle(((8,) * 6, (8,), (1,), (32,))), 200):
            for size in sizes:
                replayed = len(rehearsal.augment(torch.zeros(size, 2))) - size
                most[size] = max(most.get(size, 0), replayed)
            rehearsal.step()
    assert most[1] <= 2
    assert most[8] <= 5
    assert most[32] <= 17


def test_rows_in_small_batches_are_not_all_displaced() -> None:
    seen = {1: [0, 0], 64: [0, 0]}
    with Rehearsal({"buffer": {"capacity": 1000}, "ratio": RATIO, "mode": "replace"}) as rehearsal:
        for step, size in zip(range(900), itertools.cycle((1, 1, 64)), strict=False):
            out = rehearsal.update(torch.full((size, 1), float(step + 1)))
            seen[size][0] += int((out == step + 1).sum())
            seen[size][1] += size
    assert all(new > 0.4 * rows for new, rows in seen.values())


def test_one_exceptional_step_is_made_up_for_and_then_forgotten() -> None:
    replayed = []
    with Rehearsal({"buffer": {"capacity": 1000}, "ratio": RATIO}) as rehearsal:
        for step in range(200):
            for _ in range(30 if step == 50 else 3):
                rehearsal.augment(torch.zeros(8, 2))
            replayed.append(rehearsal.metrics()["rows_replayed"])
            rehearsal.step()
    assert replayed[-1] == pytest.approx((8 * 3 * 197 + 8 * 27) / 3, abs=2)
    assert replayed[-1] - replayed[-31] == pytest.approx(30 * 8, abs=1)


def test_rows_that_no_buffer_has_are_not_owed() -> None:
    replayed = []
    with Rehearsal({"buffer": {"capacity": 5}, "ratio": 0.8}) as rehearsal:
        for _ in range(40):
            replayed.append(sum(len(rehearsal.augment(torch.zeros(4, 2))) - 4 for _ in range(2)))
            rehearsal.step()
    assert replayed[10:] == [5] * 30


@pytest.mark.parametrize("mode", ["append", "replace"])
@pytest.mark.parametrize("epoch", [10, 13, 24])
def test_a_ratio_is_met_by_a_loader_whose_epochs_end_within_a_step(mode: str, epoch: int) -> None:
    rows = [torch.zeros(8, 2)] * epoch + [torch.zeros(3, 2)]
    with Rehearsal({"buffer": {"capacity": 1000}, "ratio": RATIO, "mode": mode, "inject": "loader"}) as rehearsal:
        seen = 0
        for _ in range(60):
            for number, batch in enumerate(RehearsalLoader(rows, rehearsal), start=1):
                seen += len(batch)
                if number % 4 == 0:
                    rehearsal.step()
            rehearsal.step()
        assert rehearsal.metrics()["rows_replayed"] / seen == pytest.approx(RATIO, abs=NEAR)


def test_a_changing_ratio_is_met_with_unequal_steps() -> None:
    share = met(PATTERNS["8 8 8 3"], ratio=0.1, ratio_schedule={"to": 0.4, "steps": STEPS})
    per_new = [share / (1 - share) for share in (0.1 + 0.3 * step / STEPS for step in range(WARM_UP, STEPS))]
    mean = sum(per_new) / len(per_new)
    assert share == pytest.approx(mean / (1 + mean), abs=NEAR)


def test_a_job_goes_on_from_a_checkpoint_as_if_nothing_had_happened(tmp_path: Any) -> None:
    def drive(rehearsal: Rehearsal, first: int, last: int) -> list[int]:
        sizes = []
        for step in range(first, last):
            sizes += [len(rehearsal.augment(torch.zeros(8, 2))) for _ in range((4, 1, 2, 7, 1)[step % 5])]
            rehearsal.step()
        return sizes

    section = {"buffer": {"capacity": 100}, "ratio": RATIO}
    with Rehearsal(section) as first, Rehearsal(section) as second:
        drive(first, 0, 23)
        first.save(tmp_path)
        second.load(tmp_path)
        assert drive(first, 23, 60) == drive(second, 23, 60)


def run_own_pattern() -> list[float]:
    """What ranks of different patterns see."""
    names = list(PATTERNS)
    own = [PATTERNS[names[(dist.get_rank() * 3 + 1 + offset) % len(names)]] for offset in range(2)]
    return [met(pattern, **keys) for pattern, keys in zip(own, ({}, AMOUNTS["replaced tokens"]), strict=True)]


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_ratio_is_met_on_ranks_whose_steps_differ(ranks: int) -> None:
    for shares in run_ranks(run_own_pattern, ranks):
        assert shares == pytest.approx([RATIO] * 2, abs=NEAR)
