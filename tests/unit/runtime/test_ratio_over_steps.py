"""The ratio is met within 0.01 over 600 steps: every pattern of steps, append and replace, rows and tokens, ranks."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch.distributed as dist

from rehearsal_plugin.distributed.transport import Transport
from tests.helpers.ranks import run_ranks
from tests.helpers.thread_ranks import run_threads
from tests.helpers.unequal_steps import AMOUNTS, NEAR, PATTERNS, RATIO, STEPS, QueueJob, share_of_job

LOOPS = {"update": True, "augment and step": False}
"""Whether a step begins with collecting rows, by the way in which a loop calls the rehearsal."""


JOBS = [
    (pattern, loop)
    for pattern, steps in PATTERNS.items()
    for loop in LOOPS
    if loop != "update" or all(len(sizes) == 1 for sizes in steps)  # it takes one batch a step
]


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize(("pattern", "loop"), JOBS)
def test_a_ratio_is_met_whatever_the_steps_look_like(pattern: str, amount: str, loop: str) -> None:
    job = QueueJob(LOOPS[loop], **AMOUNTS[amount])
    assert job.run(PATTERNS[pattern]) == pytest.approx(RATIO, abs=NEAR)
    for size in filter(None, job.seen):  # single rows beside batches of 64, too
        assert job.share(size) == pytest.approx(RATIO, abs=0.1 if "tokens" in amount else 0.03), f"of {size} rows"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("amount", AMOUNTS)
def test_a_ratio_is_met_with_steps_at_random(seed: int, amount: str) -> None:
    draw = random.Random(seed)
    pattern = [[draw.choice((0, 1, 8, 40)) for _ in range(draw.randint(0, 5))] for _ in range(STEPS)]
    assert QueueJob(**AMOUNTS[amount]).run(pattern) == pytest.approx(RATIO, abs=NEAR)


def own_pattern(rank: int, offset: int) -> Sequence[Sequence[int]]:
    """Another pattern for each rank."""
    names = list(PATTERNS)
    return PATTERNS[names[(5 * rank + offset) % len(names)]]


def share_on_thread(transport: Transport, amount: str, offset: int) -> float:
    return share_of_job(own_pattern(transport.rank, offset), transport, **AMOUNTS[amount])


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_a_ratio_is_met_on_ranks_of_different_patterns(ranks: int, amount: str) -> None:
    offset = 4 * ranks + list(AMOUNTS).index(amount)
    assert run_threads(share_on_thread, ranks, amount, offset) == pytest.approx([RATIO] * ranks, abs=NEAR)


def share_in_process(amount: str) -> float:
    return share_of_job(own_pattern(dist.get_rank(), 1), **AMOUNTS[amount])


@pytest.mark.parametrize(("ranks", "amount"), [(2, "replaced tokens"), (3, "rows")])
def test_a_ratio_is_met_over_gloo(ranks: int, amount: str) -> None:
    assert run_ranks(share_in_process, ranks, amount) == pytest.approx([RATIO] * ranks, abs=NEAR)
