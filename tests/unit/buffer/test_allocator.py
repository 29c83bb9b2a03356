"""Memory of batches that is used again: never while anything can see it, always once nothing can."""

from __future__ import annotations

import gc
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rehearsal_plugin.buffer.rows import allocator as memory
from rehearsal_plugin.buffer.rows.allocator import KEPT, LARGE, RecycledMemory, zeros

SIZE = 4 * LARGE
DTYPES = [torch.uint8, torch.bool, torch.int64, torch.bfloat16, torch.float32, torch.complex64, torch.float8_e4m3fn]


@pytest.fixture
def recycled() -> RecycledMemory:
    return RecycledMemory()


def room(recycled: RecycledMemory, nbytes: int = SIZE) -> Tensor:
    return recycled.rows(torch.empty((0, nbytes), dtype=torch.uint8), 1)


@contextmanager
def no_new_memory() -> Iterator[None]:
    def refuse(nbytes: int) -> None:
        pytest.fail(f"{nbytes} bytes of new memory")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "zeros", refuse)
        yield


@pytest.mark.parametrize("nbytes", [1, 100, LARGE, 5 << 20])
def test_memory_begins_with_a_line_of_the_cache(nbytes: int) -> None:
    for _ in range(5):
        memory = zeros(nbytes)
        assert memory.nbytes == nbytes
        assert not memory.any()
        assert memory.ctypes.data % 64 == 0


def test_memory_is_used_again_once_nothing_refers_to_it(recycled: RecycledMemory) -> None:
    address = room(recycled).data_ptr()
    with no_new_memory():
        for _ in range(10):
            assert room(recycled).data_ptr() == address


HOLDERS: dict[str, Callable[[Tensor], Any]] = {
    "the tensor": lambda rows: rows,
    "a view": lambda rows: rows[0, 5:9],
    "a view of another dtype": lambda rows: rows.view(torch.float32),
    "an array": lambda rows: rows.numpy(),
    "a part of an array": lambda rows: rows.numpy()[0, 5:9],
    "a detached tensor": lambda rows: rows.detach(),
    "its storage": lambda rows: rows.untyped_storage(),
    "a history": lambda rows: torch.ones(1, requires_grad=True) * rows.view(torch.float32),
    "a memoryview": lambda rows: rows.numpy().data,
    "a tensor by DLPack": lambda rows: np.from_dlpack(rows),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_memory_is_not_used_again_while_anything_refers_to_it(holder: str, recycled: RecycledMemory) -> None:
    rows = room(recycled)
    address = rows.data_ptr()
    held = HOLDERS[holder](rows)
    del rows
    gc.collect()
    assert room(recycled).data_ptr() != address
    del held
    gc.collect()
    assert address in {block.ctypes.data for block in recycled._free.values()}


def test_two_batches_at_a_time_have_memory_of_their_own(recycled: RecycledMemory) -> None:
    first, second = room(recycled), room(recycled)
    first.fill_(1)
    second.fill_(2)
    assert first.eq(1).all()


def test_what_is_kept_is_bounded(recycled: RecycledMemory) -> None:
    many = [room(recycled) for _ in range(3 * KEPT)]
    del many
    assert len(recycled._free) == KEPT


def test_a_block_serves_batches_that_are_a_little_smaller_but_not_much(recycled: RecycledMemory) -> None:
    address = room(recycled, SIZE).data_ptr()
    assert room(recycled, SIZE - 1).data_ptr() == address
    assert room(recycled, SIZE // 2).data_ptr() == address
    assert room(recycled, SIZE // 2 - 1).data_ptr() != address


def test_a_tensor_may_end_in_another_thread_and_after_its_owner(recycled: RecycledMemory) -> None:
    held = [room(recycled) for _ in range(20)]
    del recycled
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join(10)
    assert not held


def test_threads_never_get_one_block_at_a_time(recycled: RecycledMemory) -> None:
    def use(number: int) -> None:
        held: list[Tensor] = []
        for turn in range(400):
            rows = room(recycled, LARGE + 64 * (turn % 3)).fill_(number)
            held = [*held[-(turn % 4) :], rows]
            if any(int(one[0, 0]) != number or int(one[0, -1]) != number for one in held):
                return
        unbroken.append(number)

    unbroken: list[int] = []
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    sys.setswitchinterval(interval)
    assert sorted(unbroken) == [0, 1, 2, 3]
    assert len(recycled._free) <= KEPT


@pytest.mark.parametrize("later", range(12))
def test_a_block_may_come_back_while_one_is_looked_for(later: int, recycled: RecycledMemory) -> None:
    """As where the garbage collector runs in between, which ends a batch that is part of a cycle."""
    rows = [room(recycled) for _ in range(4)]
    rows[0].cycle = rows[0]  # type: ignore[attr-defined]
    del rows
    thresholds, tuples = gc.get_threshold(), [(number, -number) for number in range(2100)]  # none is left to be reused
    gc.set_threshold(gc.get_count()[0] + later, 10, 10)
    try:
        assert room(recycled).shape == (1, SIZE)
    finally:
        gc.set_threshold(*thresholds)
    assert len(tuples) == 2100


def test_small_rows_and_those_elsewhere_are_left_to_torch(recycled: RecycledMemory) -> None:
    del recycled._free  # whatever would use it fails
    assert recycled.rows(torch.empty((0, 16), dtype=torch.uint8), 3).shape == (3, 16)
    assert recycled.rows(torch.empty((0, SIZE), dtype=torch.uint8, device="meta"), 3).device.type == "meta"


@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3), st.tuples(*2 * [st.integers(0, 4)]))
def test_joining_gives_what_torch_gives(dtype: torch.dtype, shape: list[int], sizes: tuple[int, int]) -> None:
    first, second = (torch.randint(0, 2, (size, *shape)).to(dtype) for size in sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "LARGE", 1)
        joined = RecycledMemory().cat(first, second)
    expected = torch.cat((first, second))
    assert joined.dtype == expected.dtype
    assert joined.shape == expected.shape
    assert joined.view(torch.uint8).equal(expected.view(torch.uint8)) if expected.ndim > 1 else joined.equal(expected)


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "every other": lambda rows: rows[:, ::2],
    "channels last": lambda rows: rows.view(8, 64, 16, -1).to(memory_format=torch.channels_last),
    "transposed": lambda rows: rows.view(8, 64, -1).transpose(1, 2),
    "conjugate": lambda rows: torch.complex(rows, rows).conj(),
    "negative": lambda rows: torch.complex(rows, rows).conj().imag,
    "expanded": lambda rows: rows[:, :1].expand(-1, SIZE),
}


@pytest.mark.parametrize("form", FORMS)
def test_tensors_of_any_form_are_joined(form: str, recycled: RecycledMemory) -> None:
    first, second = (FORMS[form](torch.randn(8, SIZE // 16)) for _ in range(2))
    joined, expected = recycled.cat(first, second), torch.cat((first, second))
    assert joined.equal(expected)
    assert joined.stride() == expected.stride()


def test_a_history_is_continued(recycled: RecycledMemory) -> None:
    first, second = torch.randn(2, SIZE, requires_grad=True), torch.randn(1, SIZE)
    recycled.cat(first, second).sum().backward()  # type: ignore[no-untyped-call]
    assert first.grad is not None


def test_dtypes_are_promoted_and_misfits_refused_as_by_torch(recycled: RecycledMemory) -> None:
    assert recycled.cat(torch.zeros(1, SIZE), torch.zeros(1, SIZE, dtype=torch.float64)).dtype == torch.float64
    with pytest.raises(RuntimeError):
        recycled.cat(torch.zeros(1, SIZE), torch.zeros(1, SIZE + 1))


def test_joining_touches_no_fresh_page_in_the_steady_state(recycled: RecycledMemory) -> None:
    first, second = torch.randn(6, 1 << 18), torch.randn(2, 1 << 18)
    for _ in range(3):
        recycled.cat(first, second)
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    with no_new_memory():
        for _ in range(20):
            recycled.cat(first, second)
    assert resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before < 20  # of 2,048 pages each time
    np.testing.assert_array_equal(recycled.cat(first, second).numpy()[:6], first.numpy())
