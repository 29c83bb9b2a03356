"""The compiled copies: what numpy's give, for any length of rows, and nothing at all for arguments that do not fit."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

as_built: ModuleType = pytest.importorskip("rehearsal_plugin.buffer.rows._copies", reason="no compiler")
gather, scatter = as_built.gather, as_built.scatter

LENGTHS = st.one_of(
    st.integers(1, 200), st.sampled_from([511, 512, 513, 575, 576, 4096, 16384, 65535, 65536, 65537, 70000])
)
"""Bytes of a row: around those from which on it is copied in another way."""

CAPACITY = 6


def random_bytes(rows: int, nbytes: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (rows, nbytes), dtype=np.uint8)


@pytest.fixture(scope="module", params=["as built", "COPIES_NARROW", "COPIES_PLAIN"])
def copies(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The compiled copies; also as other processors would have them."""
    if request.param == "as built":
        return as_built
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("needs a compiler of C")
    source = Path(str(as_built.__file__)).with_name("_copies.c")
    library = tmp_path_factory.mktemp(request.param) / "_copies.so"
    options = ["-O3", "-shared", "-fPIC", f"-D{request.param}", f"-I{sysconfig.get_path('include')}"]
    subprocess.run([compiler, *options, str(source), "-o", str(library)], check=True)
    spec = importlib.util.spec_from_file_location("_copies", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@given(nbytes=LENGTHS, slots=st.lists(st.integers(0, CAPACITY - 1), max_size=11), shift=st.integers(0, 63))
def test_gathered_rows_are_those_at_the_slots(copies: ModuleType, nbytes: int, slots: list[int], shift: int) -> None:
    rows = random_bytes(1, CAPACITY * nbytes + shift)[0, shift:].reshape(CAPACITY, nbytes)
    out = np.zeros((len(slots) + 1, nbytes), dtype=np.uint8)
    index = np.array(slots, dtype=np.int64)
    copies.gather(rows, index, out[:-1])
    np.testing.assert_array_equal(out[:-1], rows[index])
    assert not out[-1].any()


@given(nbytes=LENGTHS, before=st.integers(0, 64), after=st.integers(0, 64), seed=st.integers(0, 2**20))
def test_samples_go_to_their_cells_and_to_nothing_beside_them(
    copies: ModuleType, nbytes: int, before: int, after: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rows = random_bytes(CAPACITY, before + nbytes + after)
    samples = random_bytes(4, nbytes, seed)
    slots, expected = rng.permutation(CAPACITY)[:4], rows.copy()
    expected[slots, before : before + nbytes] = samples
    copies.scatter(rows, slots, [before], [samples], None)
    np.testing.assert_array_equal(rows, expected)


@given(nbytes=LENGTHS, places=st.lists(st.integers(0, 4), max_size=CAPACITY))
def test_some_samples_can_be_chosen(copies: ModuleType, nbytes: int, places: list[int]) -> None:
    rows, samples = random_bytes(CAPACITY, nbytes), random_bytes(5, nbytes, seed=1)
    slots, chosen = np.arange(CAPACITY)[::-1][: len(places)], np.array(places, dtype=np.int64)
    expected = rows.copy()
    expected[slots] = samples[chosen]
    copies.scatter(rows, slots, [0], [samples], chosen)
    np.testing.assert_array_equal(rows, expected)


@given(lengths=st.lists(st.one_of(st.just(0), LENGTHS), min_size=1, max_size=12), chosen=st.booleans())
def test_columns_go_side_by_side(copies: ModuleType, lengths: list[int], chosen: bool) -> None:
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    rows, columns = np.zeros((CAPACITY, offsets[-1]), dtype=np.uint8), [random_bytes(4, n, seed=n) for n in lengths]
    slots, places = np.array([4, 1]), np.array([3, 0])
    samples = columns if chosen else [column[places] for column in columns]
    copies.scatter(rows, slots, offsets[:-1].tolist(), samples, places if chosen else None)
    expected = np.zeros_like(rows)
    expected[slots] = np.concatenate(columns, axis=1)[places]
    np.testing.assert_array_equal(rows, expected)


def test_samples_of_any_shape_and_dtype_are_bytes() -> None:
    rows, samples = np.zeros((3, 24), dtype=np.uint8), np.arange(12, dtype=np.complex64).reshape(4, 3)
    scatter(rows, np.array([2, 0]), [0], [samples], np.array([3, 1]))
    assert rows[2].view(np.complex64).tolist() == [9, 10, 11]
    assert rows[0].view(np.complex64).tolist() == [3, 4, 5]


MISFITS: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "a slot past the end": (IndexError, {"slots": np.array([0, CAPACITY])}),
    "a slot before the begin": (IndexError, {"slots": np.array([0, -1])}),
    "more slots than rows": (ValueError, {"slots": np.arange(3)}),
    "slots of 4 bytes": (ValueError, {"slots": np.arange(2, dtype=np.int32)}),
    "slots in a matrix": (ValueError, {"slots": np.zeros((2, 1), dtype=np.int64)}),
    "rows of other items": (ValueError, {"rows": np.zeros((CAPACITY, 8), dtype=np.int64)}),
    "rows in a line": (ValueError, {"rows": np.zeros(CAPACITY * 8, dtype=np.uint8)}),
    "rows that lie apart by the byte": (ValueError, {"rows": np.zeros((CAPACITY, 16), dtype=np.uint8)[:, ::2]}),
}
FIT: dict[str, Any] = {"rows": random_bytes(CAPACITY, 8), "slots": np.arange(2), "other": random_bytes(2, 8, seed=1)}


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("copy", ["gather", "scatter"])
def test_what_does_not_fit_is_refused_and_nothing_is_copied(misfit: str, copy: str) -> None:
    error, change = MISFITS[misfit]
    rows, slots, other = ({**FIT, **change}[name] for name in ("rows", "slots", "other"))
    before = rows.copy(), other.copy()
    with pytest.raises(error):
        gather(rows, slots, other) if copy == "gather" else scatter(rows, slots, [0], [other], None)
    np.testing.assert_array_equal(rows, before[0])
    np.testing.assert_array_equal(other, before[1])


@pytest.mark.parametrize(
    ("error", "change"),
    [
        (ValueError, {"columns": [random_bytes(2, 9)]}),
        (ValueError, {"columns": [random_bytes(3, 8)]}),
        (ValueError, {"columns": [random_bytes(4, 8)[::2]]}),
        (ValueError, {"columns": [np.zeros((), dtype=np.uint8)]}),
        (ValueError, {"columns": [random_bytes(2, 4), random_bytes(3, 4)], "offsets": [0, 4]}),
        (ValueError, {"columns": [random_bytes(2, 4)], "offsets": [5]}),
        (ValueError, {"columns": [random_bytes(2, 4)], "offsets": [-1]}),
        (ValueError, {"columns": [random_bytes(2, 4)], "offsets": [0, 4]}),
        (ValueError, {"columns": [], "offsets": []}),
        (ValueError, {"columns": random_bytes(2, 8)}),
        (ValueError, {"columns": (random_bytes(2, 8),)}),
        (TypeError, {"columns": [random_bytes(2, 8)], "offsets": ["0"]}),
        (OverflowError, {"columns": [random_bytes(2, 8)], "offsets": [1 << 70]}),
        (TypeError, {"columns": [random_bytes(2, 4), [[0] * 4] * 2], "offsets": [0, 4]}),
        (IndexError, {"places": np.array([0, 2])}),
        (IndexError, {"places": np.array([-1, 0])}),
        (ValueError, {"places": np.array([0])}),
    ],
)
def test_samples_that_do_not_fit_are_refused(error: type[Exception], change: dict[str, Any]) -> None:
    rows = random_bytes(CAPACITY, 8)
    before, arguments = rows.copy(), {"offsets": [0], "columns": [random_bytes(2, 8)], "places": None, **change}
    with pytest.raises(error):
        scatter(rows, np.arange(2), arguments["offsets"], arguments["columns"], arguments["places"])
    np.testing.assert_array_equal(rows, before)


def test_memory_that_may_not_be_written_is_not() -> None:
    rows = random_bytes(CAPACITY, 8)
    rows.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        scatter(rows, np.arange(2), [0], [random_bytes(2, 8)], None)
    with pytest.raises(ValueError, match="read-only"):
        gather(rows, np.arange(2), rows[:2])


def test_no_buffer_stays_open() -> None:
    rows, slots, other, wrong = random_bytes(CAPACITY, 8), np.arange(2), random_bytes(2, 8), np.array([0, CAPACITY])
    counts = [sys.getrefcount(argument) for argument in (rows, slots, other, wrong)]
    gather(rows, slots, other)
    scatter(rows, slots, [0, 0], [other, other], slots)
    with pytest.raises(IndexError):
        gather(rows, wrong, other)
    with pytest.raises(IndexError):
        scatter(rows, slots, [0, 0], [other, other], wrong)
    with pytest.raises(ValueError, match="one number of samples"):
        scatter(rows, slots, [0, 0], [other, rows], None)
    assert [sys.getrefcount(argument) for argument in (rows, slots, other, wrong)] == counts


@pytest.fixture
def turns() -> Iterator[Callable[[], int]]:
    """How often another thread has come to run: it does only while the calling one gives the GIL up by itself."""
    count, ended, interval = 0, threading.Event(), sys.getswitchinterval()

    def run() -> None:
        nonlocal count
        while not ended.is_set():
            count += 1
            time.sleep(0)

    thread = threading.Thread(target=run)
    sys.setswitchinterval(1000)
    thread.start()
    yield lambda: count
    sys.setswitchinterval(interval)
    ended.set()
    thread.join()


INDEX = np.arange(64)
COPIES: dict[str, Callable[[NDArray[np.uint8], NDArray[np.uint8]], None]] = {
    "gather": lambda rows, other: gather(rows, INDEX, other),
    "scatter": lambda rows, other: scatter(rows, INDEX, [0], [other], None),
}


@pytest.mark.parametrize("copy", COPIES)
def test_other_threads_run_during_a_long_copy(copy: str, turns: Callable[[], int]) -> None:
    rows, other = np.zeros((64, 1 << 20), dtype=np.uint8), np.zeros((64, 1 << 20), dtype=np.uint8)
    before = turns()
    for _ in range(100):  # the other core may be busy
        COPIES[copy](rows, other)
        if turns() > before:
            return
    pytest.fail("no other thread ran during 100 copies of 64 MiB")


@pytest.mark.parametrize("copy", COPIES)
def test_a_short_copy_hands_the_gil_to_nobody(copy: str, turns: Callable[[], int]) -> None:
    rows, other = np.zeros((64, 1 << 10), dtype=np.uint8), np.zeros((64, 1 << 10), dtype=np.uint8)
    before = turns()
    for _ in range(1000):
        COPIES[copy](rows, other)
    assert turns() == before
