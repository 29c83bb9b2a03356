"""Copies without a compiler: the same bytes, the same refusals, and one warning in a job."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rehearsal_plugin.buffer.rows import numpy_copies
from tests.helpers.paths import ROOT
from tests.unit.buffer.test_copies import CAPACITY, FIT, MISFITS, random_bytes

compiled: Any = pytest.importorskip("rehearsal_plugin.buffer.rows._copies", reason="installed without a compiler")

Call = Callable[[ModuleType], list[np.ndarray[Any, Any]]]


def agree(call: Call) -> None:
    """Both implementations leave the same bytes, or raise errors of one type."""
    outcomes: list[Any] = []
    for module in (compiled, numpy_copies):
        try:
            outcomes.append([array.tobytes() for array in call(module)])
        except (IndexError, ValueError, TypeError, OverflowError) as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]


SEEDS = st.integers(0, 2**20)


@settings(deadline=None)
@given(seed=SEEDS, count=st.integers(0, CAPACITY), nbytes=st.integers(0, 300), chosen=st.booleans())
def test_scattered_rows_agree(seed: int, count: int, nbytes: int, chosen: bool) -> None:
    def scatter(copies: ModuleType) -> list[np.ndarray[Any, Any]]:
        rng = np.random.default_rng(seed)
        rows, samples = random_bytes(CAPACITY, nbytes + 9), random_bytes(count + 2, nbytes, seed)
        places = rng.integers(0, count + 2, count) if chosen else None
        cells = [samples if chosen else samples[:count], np.zeros((len(samples) if chosen else count, 1), np.uint8)]
        copies.scatter(rows, rng.permutation(CAPACITY)[:count], [8, 3], cells, places)
        return [rows]

    agree(scatter)


@settings(deadline=None)
@given(slots=st.lists(st.integers(-1, CAPACITY), max_size=9), nbytes=st.integers(0, 300))
def test_gathered_rows_agree(slots: list[int], nbytes: int) -> None:
    def gather(copies: ModuleType) -> list[np.ndarray[Any, Any]]:
        out = np.zeros((len(slots), nbytes), dtype=np.uint8)
        copies.gather(random_bytes(CAPACITY, nbytes), np.array(slots, dtype=np.int64), out)
        return [out]

    agree(gather)


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("copy", ["gather", "scatter"])
def test_misfits_are_refused_alike(misfit: str, copy: str) -> None:
    rows, slots, other = ({**FIT, **MISFITS[misfit][1]}[name] for name in ("rows", "slots", "other"))
    before = rows.copy(), other.copy()

    def refused(copies: ModuleType) -> list[np.ndarray[Any, Any]]:
        arguments = (rows, slots, other) if copy == "gather" else (rows, slots, [0], [other], None)
        getattr(copies, copy)(*arguments)
        return [rows, other]

    agree(refused)
    assert (rows == before[0]).all()
    assert (other == before[1]).all()


@pytest.mark.parametrize(
    ("offsets", "columns"),
    [
        ([0], [random_bytes(2, 9)]),
        ([0], [random_bytes(3, 8)]),
        ([0], [random_bytes(4, 8)[::2]]),
        ([0], [np.zeros((), dtype=np.uint8)]),
        ([0, 4], [random_bytes(2, 4), random_bytes(3, 4)]),
        ([-1], [random_bytes(2, 4)]),
        ([0, 4], [random_bytes(2, 4)]),
        ([], []),
        ([0], (random_bytes(2, 8),)),
        (["0"], [random_bytes(2, 8)]),
        ([1 << 70], [random_bytes(2, 8)]),
        ([0], [[[0] * 8] * 2]),
    ],
)
def test_columns_that_do_not_fit_are_refused_alike(offsets: Any, columns: Any) -> None:
    def scatter(copies: ModuleType) -> list[np.ndarray[Any, Any]]:
        copies.scatter(random_bytes(CAPACITY, 8), np.arange(2), offsets, columns, None)
        return []

    agree(scatter)


@settings(deadline=None)
@given(seed=SEEDS, count=st.integers(0, 6), most=st.integers(0, 40), shift=st.integers(-1, 3))
def test_copied_runs_agree(seed: int, count: int, most: int, shift: int) -> None:
    def copy_runs(copies: ModuleType) -> list[np.ndarray[Any, Any]]:
        rng = np.random.default_rng(seed)
        sizes = rng.integers(0, most + 1, count)
        to, source = [np.zeros(200, np.uint8) for _ in range(2)], [random_bytes(1, 120, seed)[0] for _ in range(3)]
        which, starts = rng.integers(0, 2, count), np.concatenate(([0], np.cumsum(sizes)))[:count]
        begins = rng.integers(0, 120 - most + shift, count) if count else np.zeros(0, np.int64)
        copies.copy_runs(to, which, starts, source, rng.integers(0, 3, count), begins, sizes)
        return to

    agree(copy_runs)


@settings(deadline=None)
@given(seed=SEEDS, count=st.integers(0, 5), step=st.integers(1, 8), longest=st.integers(0, 30))
def test_found_lengths_agree(seed: int, count: int, step: int, longest: int) -> None:
    def find_lengths(copies: ModuleType) -> list[np.ndarray[Any, Any]]:
        rng, row_bytes = np.random.default_rng(seed), 5 + step * longest + 3
        blank = random_bytes(1, row_bytes, seed)[0]
        rows = np.tile(blank, (CAPACITY, 1))
        rows[rng.random(rows.shape) < 0.05] ^= 1
        bounds, lengths = rng.integers(0, longest + 1, CAPACITY), rng.integers(0, 4, count)
        copies.find_lengths(rows, rng.integers(0, CAPACITY, count), blank, 5, step, bounds, lengths)
        return [lengths]

    agree(find_lengths)


@settings(deadline=None)
@given(seed=SEEDS, count=st.integers(0, 5), longest=st.integers(0, 12), short=st.integers(-1, 1))
def test_trimmed_and_padded_rows_agree(seed: int, count: int, longest: int, short: int) -> None:
    def trim_and_pad(copies: ModuleType) -> list[np.ndarray[Any, Any]]:
        rng, row_bytes = np.random.default_rng(seed), 8 + 12 * 4 + 12 * 2
        pieces = np.array([0, 8, 56]), np.array([5, 0, 0]), np.array([0, 4, 2])
        rows, lengths = random_bytes(CAPACITY, row_bytes, seed), rng.integers(0, longest + 1, count)
        sizes = 5 + 6 * lengths
        starts, which = np.concatenate(([0], np.cumsum(sizes)))[:count], np.zeros(count, np.int64)
        packed = np.zeros(max(0, int(sizes.sum()) - max(0, short)), np.uint8)
        copies.trim_rows(rows, rng.integers(0, CAPACITY, count), lengths, *pieces, [packed], which, starts)
        out, bounds = random_bytes(count, row_bytes, seed + 1), rng.integers(0, 13, count)
        blank = random_bytes(1, row_bytes, seed + 2)[0]
        copies.pad_rows([packed], which, starts, lengths, *pieces, blank, out, bounds)
        return [packed, out, bounds]

    agree(trim_and_pad)


JOB = ROOT / "scripts" / "common" / "first_job.py"
WITHOUT = """
import runpy, sys
sys.modules["rehearsal_plugin.buffer.rows._copies"] = None
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_job(*command: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert "the rows are those of every installation" in done.stdout
    return done.stderr


def test_a_job_without_the_compiled_copies_has_the_same_bits_and_one_warning() -> None:
    assert "installed without its compiled copies" not in run_job(JOB, "compiled")
    assert run_job("-c", WITHOUT, JOB, "numpy").count("installed without its compiled copies") == 1
