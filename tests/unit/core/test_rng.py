"""Random numbers by address."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray

from rehearsal_plugin.core.rng import Purpose, generator, integers_below
from tests.helpers.chance import SIGNIFICANCE, equally_likely

LARGEST = 2**63 - 1


def test_an_address_always_gives_the_same_numbers() -> None:
    first, again = (generator(7, Purpose.DRAW, 3, 2).random(100) for _ in range(2))
    assert (first == again).all()


@pytest.mark.parametrize(
    "other",
    [
        generator(8, Purpose.DRAW, 3, 2),
        generator(7, Purpose.ADMISSION, 3, 2),
        generator(7, Purpose.DRAW, 4, 2),
        generator(7, Purpose.DRAW, 3, 1),
        generator(7, Purpose.DRAW, 2, 3),
    ],
    ids=["seed", "purpose", "step", "rank", "step and rank swapped"],
)
def test_another_address_gives_other_numbers(other: np.random.Generator) -> None:
    assert not np.isin(other.random(1000), generator(7, Purpose.DRAW, 3, 2).random(1000)).any()


def test_the_largest_seed_step_and_rank_are_addresses_of_their_own() -> None:
    largest = generator(LARGEST, Purpose.DRAW, LARGEST, 2**31 - 1).random(100)
    assert not np.isin(largest, generator(LARGEST, Purpose.DRAW, LARGEST - 1, 2**31 - 1).random(100)).any()


@pytest.mark.parametrize("neighbour", ["seed", "step", "rank"])
def test_neighbouring_addresses_are_independent(neighbour: str) -> None:
    def first(offset: int, i: int) -> int:
        address = {"seed": 1, "step": 1, "rank": 1}
        address[neighbour] = 2 * i + offset
        return int(generator(address["seed"], Purpose.DRAW, address["step"], address["rank"]).integers(5))

    pairs = [(first(0, i), first(1, i)) for i in range(5000)]
    assert equally_likely(pairs, 25) > SIGNIFICANCE


def test_integers_below_a_bound_are_equally_likely() -> None:
    numbers = integers_below(7, 7000, generator(0, Purpose.DRAW, 0))
    assert numbers.dtype == np.int64
    assert equally_likely(numbers.tolist(), 7) > SIGNIFICANCE


def test_every_integer_may_have_a_bound_of_its_own() -> None:
    bounds = np.tile([1, 2, 5], 3000)
    numbers = integers_below(bounds, len(bounds), generator(0, Purpose.DRAW, 1))
    assert not numbers[bounds == 1].any()
    for bound in (2, 5):
        assert equally_likely(numbers[bounds == bound].tolist(), bound) > SIGNIFICANCE


class Highest:
    """Draws the largest number below 1 that a generator gives."""

    def random(self, size: int) -> NDArray[np.float64]:
        return np.full(size, 1 - 2.0**-53)


@pytest.mark.parametrize("bound", [1, 3, 2**20, 2**31 - 1, 2**40 + 1, 2**52 - 1, 2**53 - 1])
def test_no_integer_reaches_its_bound(bound: int) -> None:
    assert integers_below(bound, 1, cast("np.random.Generator", Highest())).tolist() == [bound - 1]
