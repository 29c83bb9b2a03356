"""Draws of a strategy through `Rehearsal`: how many, how large, how random."""

from __future__ import annotations

import functools
from fractions import Fraction
from math import comb

import pytest
from scipy.stats import chisquare

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.distributed.transport import LocalTransport
from tests.helpers.chance import SIGNIFICANCE, equally_included, equally_likely
from tests.helpers.replay_jobs import (
    SIZE,
    STEPS,
    WANTED,
    ranks,
    section,
    spy,
    train,
)
from tests.helpers.samples import new_batch


def test_representatives_are_those_of_each_draw() -> None:
    found = train(name="der++")
    assert [[len(ids) for ids, _ in draws] for draws in found.draws[3:]] == [[WANTED, WANTED]] * (STEPS - 3)
    assert found.metrics["rows_replayed"] == 2 * WANTED * (STEPS - 3)


@functools.cache
def stationary() -> list[list[list[int]]]:
    """Both draws of every step, from a buffer that always holds the rows 0 to 11."""
    drawn = []
    keys = section("der++", representatives=3, buffer={"capacity": 12, "policy": "fifo"})
    with Rehearsal(keys, LocalTransport()) as rehearsal:
        calls = spy(rehearsal.strategy)
        for _ in range(3000):
            batch = rehearsal.augment(new_batch(0, 0, 12))
            rehearsal.loss(lambda outputs, *_: outputs.mean(), batch["half"].float(), batch["label"], batch["id"])
            rehearsal.step()
            drawn.append([part.targets[1].tolist() for part in calls.pop()[1:]])
    return drawn[3:]


def test_each_draw_is_uniform_and_without_replacement() -> None:
    for turn in range(2):
        draws = [ids[turn] for ids in stationary()]
        assert all(len(set(ids)) == 3 for ids in draws)
        counts = [sum(row in ids for ids in draws) for row in range(12)]
        assert equally_included(counts, len(draws), 3) > SIGNIFICANCE


def test_the_two_draws_are_independent() -> None:
    pairs = [(first[0], second[0]) for first, second in stationary()]
    assert equally_likely(pairs, 144) > SIGNIFICANCE
    common = [len(set(first) & set(second)) for first, second in stationary()]
    chance = [comb(3, n) * comb(9, 3 - n) / comb(12, 3) for n in range(4)]
    observed = [common.count(n) for n in range(4)]
    assert chisquare(observed, [p * len(common) for p in chance]).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("mode", ["append", "replace"])
@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_the_ratio_is_met_by_both_draws_together(mode: str, ratio: float) -> None:
    found = train(name="der++", ratio=ratio, mode=mode, steps=60)
    share = Fraction(str(ratio))
    due = share / (1 - share if mode == "append" else 1) / 2 * SIZE * 57
    assert found.metrics["rows_replayed"] == 2 * (due.numerator // due.denominator)
    assert all(len(first[0]) == len(second[0]) for first, second in (draws for draws in found.draws if draws))


def test_every_micro_batch_gets_both_draws() -> None:
    found = train(name="der++", passes=2)
    assert [[len(ids) for ids, _ in draws] for draws in found.draws[6:]] == [[WANTED, WANTED]] * (2 * STEPS - 6)
    for first, second in zip(found.draws[6::2], found.draws[7::2], strict=True):
        for turn in range(2):
            rows = first[turn][0] + second[turn][0]
            assert len(set(rows)) == len(rows), "a draw is without replacement over all micro-batches of a step"
    assert found.metrics["rows_offered"] == 2 * STEPS * SIZE


@pytest.mark.slow
def test_two_draws_are_still_one_exchange() -> None:
    for rank in ranks():
        assert rank["der++"].metrics["collectives"] == 2 * STEPS - 1, "headers each step, rows from the second on"
        assert rank["passes"].metrics["collectives"] == 2 * STEPS - 1
