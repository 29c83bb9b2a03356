"""Runs of bytes in several arrays."""

from __future__ import annotations

import numpy as np
import pytest

from rehearsal_plugin.buffer.rows.runs import Runs


def array(text: str) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.frombuffer(text.encode(), dtype=np.uint8).copy()


def numbers(*values: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(values, dtype=np.int64)


def test_runs_are_copied_between_arrays() -> None:
    source = Runs([array("abcdef"), array("uvwxyz")], numbers(1, 0), numbers(2, 4))
    first, second = array("......"), array("...")
    source.copy_to(Runs([first, second], numbers(0, 1), numbers(3, 1)), numbers(3, 2))
    assert bytes(first) == b"...wxy"
    assert bytes(second) == b".ef"


def test_selected_runs_lie_where_they_lay() -> None:
    runs = Runs([array("abc"), array("uvw"), array("xyz")], numbers(0, 2, 1), numbers(0, 1, 2))
    chosen = runs.select(numbers(1, 1, 0))
    assert len(chosen) == 3
    out = array("...")
    chosen.copy_to(Runs.packed(out, numbers(1, 1, 1)), numbers(1, 1, 1))
    assert bytes(out) == b"yya"


def test_nothing_is_copied_of_nothing() -> None:
    Runs([], numbers(), numbers()).copy_to(Runs([], numbers(), numbers()), numbers())


@pytest.mark.parametrize(
    ("which", "start", "size"), [(1, 0, 1), (0, 5, 1), (0, 2, 3), (0, -1, 1), (0, 0, -1), (0, 1 << 62, 1 << 62)]
)
def test_a_run_that_no_array_holds_writes_nothing(which: int, start: int, size: int) -> None:
    out, source = array("...."), array("abcd")
    for runs, to in (
        (Runs([source], numbers(0, which), numbers(0, start)), Runs([out], numbers(0, 0), numbers(0, 1))),
        (Runs([source], numbers(0, 0), numbers(0, 1)), Runs([out], numbers(0, which), numbers(0, start))),
    ):
        with pytest.raises(IndexError):
            runs.copy_to(to, numbers(1, size))
        assert bytes(out) == b"...."


def test_one_size_belongs_to_each_run() -> None:
    runs = Runs([array("abcd")], numbers(0, 0), numbers(0, 1))
    with pytest.raises(ValueError, match="one size of each run"):
        runs.copy_to(runs, numbers(1))
