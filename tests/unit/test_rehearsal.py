"""What a training loop may rely on: one process alone."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import tracemalloc
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.buffer.row_reader import RowReader
from rehearsal_plugin.buffer.rows import allocator as memory
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.buffer.storage import HostStorage
from rehearsal_plugin.core.background_thread import BackgroundThread
from rehearsal_plugin.distributed.transport import LocalTransport
from rehearsal_plugin.errors import BatchError, ClosedError, ConfigError, RehearsalError, StorageError
from rehearsal_plugin.runtime import prefetcher as prefetcher
from tests.helpers.samples import Batch, ids_of, intact, new_batch, same, step_of

SIZE = 8


def alone(**keys: Any) -> Rehearsal:
    section = {"buffer": {"capacity": 64}, **keys}
    if "ratio" not in keys:
        section.setdefault("representatives", 4)
    return Rehearsal(section, LocalTransport())


def run(rehearsal: Rehearsal, steps: int, size: int = SIZE) -> list[Batch]:
    """What the model sees in each of `steps` steps."""
    with rehearsal:
        return [rehearsal.update(new_batch(0, step, size)) for step in range(steps)]


def test_the_batchs_own_rows_come_first_bit_identical() -> None:
    for step, seen in enumerate(run(alone(), 30)):
        assert same({name: field[:SIZE] for name, field in seen.items()}, new_batch(0, step, SIZE))


def test_all_fields_of_a_replayed_row_stay_together() -> None:
    assert all(intact(seen) for seen in run(alone(), 50))


def test_the_third_update_is_the_first_with_replayed_rows() -> None:
    assert [len(seen["id"]) for seen in run(alone(), 5)] == [SIZE, SIZE, SIZE + 4, SIZE + 4, SIZE + 4]


def test_a_batch_is_never_its_own_rehearsal() -> None:
    for step, seen in enumerate(run(alone(buffer={"capacity": 8, "policy": "fifo"}), 30)):
        assert all(step_of(row) <= step - 2 for row in ids_of(seen, SIZE)), f"step {step}"


def test_no_row_is_replayed_twice_in_a_step() -> None:
    for seen in run(alone(representatives=40), 30):
        assert len(set(seen["id"].tolist())) == len(seen["id"])


def test_threads_change_nothing_bit_for_bit() -> None:
    threaded, inline = (run(alone(exchange={"launch": launch}), 60) for launch in ("thread", "inline"))
    assert all(same(a, b) for a, b in zip(threaded, inline, strict=True))


def test_the_seed_makes_the_run() -> None:
    first, again, other = (run(alone(seed=seed, candidates=3), 60) for seed in (1, 1, 2))
    assert all(same(a, b) for a, b in zip(first, again, strict=True)), "the same seed gave another run"
    assert not all(same(a, b) for a, b in zip(first, other, strict=True)), "another seed gave the same run"


def test_replace_keeps_the_size_and_gives_the_last_places_to_replayed_rows() -> None:
    for step, seen in enumerate(run(alone(mode="replace", representatives=3), 20)):
        kept = SIZE if step < 2 else SIZE - 3
        assert len(seen["id"]) == SIZE
        assert same({k: v[:kept] for k, v in seen.items()}, {k: v[:kept] for k, v in new_batch(0, step, SIZE).items()})
        assert all(step_of(row) < step for row in ids_of(seen, kept))


def test_replace_offers_and_counts_the_displaced_rows() -> None:
    rehearsal = alone(mode="replace", representatives=3, buffer={"capacity": 1000})
    run(rehearsal, 20)
    metrics = rehearsal.metrics()
    assert metrics["rows_displaced"] == metrics["rows_replayed"] == 18 * 3
    assert metrics["rows_stored"] == metrics["rows_offered"] == 20 * SIZE


@pytest.mark.parametrize("mode", ["append", "replace"])
@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.125])
def test_the_ratio_is_exact_over_a_thousand_steps(mode: str, ratio: float) -> None:
    share = Fraction(str(ratio))
    sizes = [5 + step % 3 for step in range(1000)]
    with alone(mode=mode, ratio=ratio) as rehearsal:
        seen = [len(rehearsal.update(new_batch(0, step, size))["id"]) for step, size in enumerate(sizes)]
        replayed = rehearsal.metrics()["rows_replayed"]
    # What is asked for at one step is seen two steps later.
    due = share / (1 - share if mode == "append" else 1) * sum(sizes[:-2])
    assert replayed == due.numerator // due.denominator
    assert sum(seen) == sum(sizes) + (replayed if mode == "append" else 0)


def test_without_representatives_nothing_is_added() -> None:
    assert all(len(seen["id"]) == SIZE for seen in run(alone(representatives=0), 10))


def test_micro_batches_share_one_exchange() -> None:
    with alone(buffer={"capacity": 1000}) as rehearsal:
        for step in range(20):
            seen = [rehearsal.augment(new_batch(0, 3 * step + micro, SIZE)) for micro in range(3)]
            replayed = [row for batch in seen for row in ids_of(batch, SIZE)]
            rehearsal.step()
            assert [len(batch["id"]) for batch in seen] == [SIZE + (4 if step > 2 else 0)] * 3, f"step {step}"
            assert len(set(replayed)) == len(replayed), "micro-batches of a step share no row"
            assert all(intact(batch) for batch in seen)
        metrics = rehearsal.metrics()
    assert metrics["steps"] == 20
    assert metrics["collectives"] <= 2 * 20
    assert metrics["rows_offered"] == 60 * SIZE
    assert metrics["rows_replayed"] == 17 * 12


@pytest.mark.parametrize("start", [0, 1, 3, 7])
def test_start_step_collects_and_replays_nothing_before(start: int) -> None:
    rehearsal = alone(start_step=start, buffer={"capacity": 1000})
    first = next(step for step, seen in enumerate(run(rehearsal, 12)) if len(seen["id"]) > SIZE)
    assert first == max(start, 2)
    assert rehearsal.metrics()["rows_stored"] == 12 * SIZE


def test_start_step_counts_optimizer_steps_not_micro_batches() -> None:
    with alone(start_step=5) as rehearsal:
        added = []
        for step in range(8):
            added.append([len(rehearsal.augment(new_batch(0, step, SIZE))["id"]) - SIZE for _ in range(2)])
            rehearsal.step()
    assert added == [[0, 0]] * 5 + [[4, 4]] * 3


def test_fewer_rows_than_asked_for_are_all_of_them() -> None:
    third = run(alone(representatives=50), 3, size=2)[2]
    assert sorted(ids_of(third, 2)) == new_batch(0, 0, 2)["id"].tolist()


def test_a_buffer_smaller_than_the_request_gives_all_it_has() -> None:
    rehearsal = alone(buffer={"capacity": 3}, representatives=8)
    assert [len(seen["id"]) for seen in run(rehearsal, 6)] == [8, 8, 11, 11, 11, 11]


def test_a_smaller_last_batch_is_augmented_too() -> None:
    with alone() as rehearsal:
        sizes = [len(rehearsal.update(new_batch(0, step, size))["id"]) for step, size in enumerate([8, 8, 8, 8, 3, 8])]
    assert sizes == [8, 8, 12, 12, 7, 12]


def test_candidates_are_a_random_part_of_each_batch() -> None:
    rehearsal = alone(candidates=3, buffer={"capacity": 1000}, representatives=30)
    replayed = {row for seen in run(rehearsal, 40) for row in ids_of(seen, SIZE)}
    assert rehearsal.metrics()["rows_offered"] == rehearsal.metrics()["rows_stored"] == 3 * 40
    per_step = [sum(step_of(row) == step for row in replayed) for step in range(38)]
    assert max(per_step) <= 3, "more rows of a batch were stored than there are candidates"
    assert {row % 100 for row in replayed} == set(range(SIZE)), "some places of a batch are never candidates"


def test_local_scope_moves_nothing_and_needs_nobody() -> None:
    rehearsal = alone(sampling={"scope": "local"})
    assert all(intact(seen) for seen in run(rehearsal, 20))
    assert rehearsal.metrics()["bytes_sent"] == rehearsal.metrics()["bytes_received"] == 0


def test_metrics_count_exactly() -> None:
    rehearsal = alone(buffer={"capacity": 20, "partition_by": "label"})
    replayed = [row for seen in run(rehearsal, 30) for row in seen["label"][SIZE:].tolist()]
    metrics = rehearsal.metrics()
    assert metrics["steps"] == 30
    assert metrics["rows_offered"] == 30 * SIZE
    assert metrics["rows_stored"] == 20
    assert metrics["rows_replayed"] == len(replayed) == 28 * 4
    assert metrics["rows_sent"] == metrics["rows_received"] == metrics["bytes_sent"] == 0, "nobody to send to"
    assert sum(metrics[f"rows_stored/{label}"] for label in range(5)) == 20
    assert [metrics[f"rows_replayed/{label}"] for label in range(5)] == [replayed.count(label) for label in range(5)]
    assert min(metrics[name] for name in ("waited_ms", "drawn_ms", "exchanged_ms")) >= 0


def test_the_caller_may_overwrite_its_batch_at_once() -> None:
    with alone() as rehearsal:
        for step in range(30):
            batch = new_batch(0, step, SIZE)
            assert intact(rehearsal.update(batch))
            for field in batch.values():
                field.zero_()


def test_a_refused_batch_changes_nothing() -> None:
    def losses(refuse: bool) -> list[Batch]:
        seen = []
        with alone(ratio=0.2) as rehearsal:
            for step in range(20):
                if refuse and step in (0, 1, 2, 7, 8):
                    with pytest.raises(BatchError):
                        rehearsal.update({"x": torch.zeros(3, 9)} if step else {"x": 5})
                seen.append(rehearsal.update(new_batch(0, step, 5 + step % 4)))
        return seen

    assert all(same(a, b) for a, b in zip(losses(True), losses(False), strict=True))


def test_after_close_every_call_says_so() -> None:
    rehearsal = alone()
    run(rehearsal, 4)
    rehearsal.close()
    for call in (lambda: rehearsal.update(new_batch(0, 9, SIZE)), rehearsal.step):
        with pytest.raises(ClosedError, match="closed"):
            call()
    assert rehearsal.metrics()["steps"] == 4, "metrics outlive the rehearsal"


def test_closing_a_rehearsal_that_never_saw_a_batch() -> None:
    rehearsal = alone()
    rehearsal.step()
    rehearsal.close()
    rehearsal.close()


def test_the_background_has_ended_before_the_report_is_made_and_whatever_that_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rehearsal = alone()
    rehearsal.update(new_batch(0, 0, SIZE))
    threads: list[str] = []

    def fail(*_: object) -> None:
        threads.extend(thread.name for thread in threading.enumerate() if thread.name.startswith("rehearsal"))
        raise RuntimeError("the device is gone")

    before = [thread.name for thread in threading.enumerate() if thread.name.startswith("rehearsal")]
    monkeypatch.setattr(rehearsal.report, "log_end", fail)
    with pytest.raises(RuntimeError, match="the device is gone"):
        rehearsal.close()
    assert before
    assert not threads


def test_a_failure_in_the_background_is_raised_at_the_next_update_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with alone() as rehearsal:
        for step in range(3):
            rehearsal.update(new_batch(0, step, SIZE))
        rehearsal.commit()  # waits for the background
        monkeypatch.setattr(RowReader, "read", _fail)
        rehearsal.update(new_batch(0, 3, SIZE))
        for _ in range(3):
            with pytest.raises(RehearsalError, match="rank 0 at step 3 failed: OSError: the disk is gone"):
                rehearsal.update(new_batch(0, 4, SIZE))


def _fail(*_: object) -> None:
    raise OSError("the disk is gone")


@pytest.mark.parametrize("launch", ["thread", "inline"])
def test_a_failure_to_launch_is_raised_at_the_next_update_and_again(launch: str) -> None:
    transport = LocalTransport()
    rehearsal = Rehearsal({"buffer": {"capacity": 64}, "exchange": {"launch": launch}}, transport)
    rehearsal.update(new_batch(0, 0, SIZE))
    rehearsal.commit()
    transport.all_gather = _fail  # type: ignore[assignment]
    rehearsal.update(new_batch(0, 1, SIZE))
    with pytest.raises(RehearsalError):
        rehearsal.commit()
    del transport.all_gather
    for step in (2, 3):
        with pytest.raises(RehearsalError, match="rank 0 at step 1 failed: OSError: the disk is gone"):
            rehearsal.update(new_batch(0, step, SIZE))
    rehearsal.close()


def test_many_rehearsals_in_one_process_leave_nothing_behind() -> None:
    files, threads = len(list(Path("/proc/self/fd").iterdir())), set(threading.enumerate())
    for turn in range(20):
        run(alone(seed=turn), 4)
    assert set(threading.enumerate()) <= threads
    assert len(list(Path("/proc/self/fd").iterdir())) <= files


def test_an_idle_rehearsal_keeps_no_batch_alive() -> None:
    with alone() as rehearsal:
        for step in range(5):
            batch = new_batch(0, step, SIZE)
            fields = [weakref.ref(field) for field in batch.values()]
            rehearsal.update(batch)
            del batch
            assert not any(field() is not None for field in fields)


@pytest.fixture(params=[memory.LARGE, 1], ids=["by torch", "recycled"])
def either_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches as small as these in memory of either kind."""
    monkeypatch.setattr(memory, "LARGE", request.param)


@pytest.mark.usefixtures("either_memory")
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_replayed_rows_that_somebody_holds_on_to_stay_as_they_are(micro_batches: int) -> None:
    held: list[tuple[Batch, Batch]] = []

    def hold(replayed: Batch) -> Batch:
        held.append((replayed, {name: field.clone() for name, field in replayed.items()}))
        return replayed

    with Rehearsal({"buffer": {"capacity": 64}, "representatives": 4}, LocalTransport(), transform=hold) as rehearsal:
        for step in range(20):
            for micro in range(micro_batches):
                rehearsal.augment(new_batch(0, micro_batches * step + micro, SIZE))
            rehearsal.step()
    assert len(held) == 17 * micro_batches
    assert all(same(replayed, before) for replayed, before in held)


@pytest.mark.usefixtures("either_memory")
def test_batches_that_somebody_holds_on_to_stay_as_they_are() -> None:
    with alone() as rehearsal:
        seen = [rehearsal.update(new_batch(0, step, SIZE)) for step in range(20)]
        before = [{name: field.clone() for name, field in batch.items()} for batch in seen]
        for step in range(20, 40):
            rehearsal.update(new_batch(0, step, SIZE))
    assert all(map(same, seen, before))


def at_once(worker: BackgroundThread[Any], job: Callable[[], Any]) -> Future[Any]:
    """Do the work of the background on the caller, where a profiler sees it."""
    future: Future[Any] = Future()
    future.set_result(job())
    return future


@pytest.mark.parametrize("more", [{}, {"candidates": 4}], ids=["all offered", "some offered"])
@pytest.mark.parametrize("policy", ["fifo", "random_replace", "reservoir"])
def test_a_step_allocates_no_memory_for_rows(
    policy: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BackgroundThread, "submit", at_once)
    row, steps = torch.zeros(SIZE, 1 << 16, dtype=torch.uint8), 10
    with alone(buffer={"capacity": 40, "policy": policy}, **more) as rehearsal:
        for step in range(40):
            seen = rehearsal.update({"x": row, "id": torch.arange(SIZE) + SIZE * step})
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            tracemalloc.start()
            for _ in range(steps):
                seen = rehearsal.update({"x": row, "id": torch.arange(SIZE)})
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events()) / steps
    assert len(seen["x"]) == SIZE + 4
    assert allocated < row[0].nbytes / 2, "torch"
    assert peak < row[0].nbytes, "numpy, and objects"


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what torch is asked for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", ["fifo", "random_replace", "reservoir"])
def test_a_step_gives_up_the_gil_a_fixed_number_of_times(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operation of torch does; the longer copies of rows do once."""
    monkeypatch.setattr(BackgroundThread, "submit", at_once)
    counts, steps = [], 10
    for size in (SIZE, 8 * SIZE):
        batch = {"x": torch.zeros(size, 1 << 12, dtype=torch.int64), "id": torch.arange(size)}
        with alone(buffer={"capacity": 64, "policy": policy}) as rehearsal:
            for _ in range(20):
                rehearsal.update(batch)
            with Operations() as operations:
                for _ in range(steps):
                    rehearsal.update(batch)
        counts.append(operations.count / steps)
    assert max(counts) - min(counts) <= 1  # a reservoir may keep none of a batch
    assert max(counts) < 45  # 43 with torch 2.4


THREADS = """
import os
import sys
import torch
from rehearsal_plugin import Rehearsal
from rehearsal_plugin.distributed.transport import LocalTransport

torch.set_num_threads(2)
torch.ones(1 << 22).add_(1)  # the training thread has its team
section = {"representatives": 4, "buffer": {"capacity": 12, "policy": sys.argv[1]}}
with Rehearsal(section, LocalTransport()) as rehearsal:
    before = len(os.listdir("/proc/self/task"))
    for _ in range(8):
        rehearsal.update({"x": torch.ones(8, 1 << 18, dtype=torch.uint8), "id": torch.arange(8)})
    rehearsal.drain()
    print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.parametrize("policy", ["fifo", "random_replace", "reservoir"])
def test_the_background_copies_on_its_own_thread_alone(policy: str) -> None:
    command = [sys.executable, "-c", THREADS, policy]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert told.split()[-1] == "1"


@pytest.mark.parametrize("keys", [{"representatives": SIZE}, {"representatives": 4, "strategy": {"name": "der++"}}])
def test_rows_that_would_replace_all_new_ones_are_refused(keys: dict[str, Any]) -> None:
    told = r"representatives is \d and a batch has 8 rows.*no new row"
    with alone(mode="replace", **keys) as rehearsal, pytest.raises(ConfigError, match=told):
        rehearsal.augment(new_batch(0, 0, SIZE))


def test_a_rollback_waits_for_rows_that_are_being_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetcher, "GRACE_S", 0.05)
    stall, written, write = threading.Event(), threading.Event(), HostStorage.write

    def stalled(storage: HostStorage, *arguments: Any) -> None:
        stall.wait(60)
        write(storage, *arguments)
        written.set()

    with alone(buffer={"capacity": 4, "policy": "fifo"}) as rehearsal:
        rehearsal.update({"id": torch.arange(4)})
        rehearsal.commit()
        monkeypatch.setattr(HostStorage, "write", stalled)
        rehearsal.update({"id": torch.arange(4) + 100})
        threading.Timer(0.5, stall.set).start()
        rehearsal.rollback()
        assert written.is_set()
        assert rehearsal.buffer is not None
        assert sorted(rehearsal.buffer.sample(4)["id"].tolist()) == [0, 1, 2, 3]


def test_a_rollback_gives_up_on_a_disk_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    stall, write = threading.Event(), HostStorage.write

    def stalled(storage: HostStorage, *arguments: Any) -> None:
        stall.wait(60)
        write(storage, *arguments)

    with alone(exchange={"timeout_s": 0.2}) as rehearsal:
        rehearsal.update(new_batch(0, 0, SIZE))
        rehearsal.drain()
        monkeypatch.setattr(HostStorage, "write", stalled)
        rehearsal.update(new_batch(0, 1, SIZE))
        with pytest.raises(StorageError, match=r"rank 0 has been writing .* 0\.2 s"):
            rehearsal.rollback()
        stall.set()


def test_a_rehearsal_that_is_closed_does_not_begin_anew() -> None:
    rehearsal = alone()
    rehearsal.update(new_batch(0, 0, SIZE))
    rehearsal.close()
    threads = threading.active_count()
    for call in (rehearsal.commit, rehearsal.rollback, lambda: rehearsal.restart(0)):
        with pytest.raises(ClosedError):
            call()
    assert threading.active_count() == threads


def test_a_rehearsal_that_nobody_has_any_more_is_gone_with_its_thread() -> None:
    before = set(threading.enumerate())
    rehearsal = alone()
    for step in range(5):
        rehearsal.update(new_batch(0, step, SIZE))
    rehearsal.drain()
    (thread,) = set(threading.enumerate()) - before
    held = weakref.ref(rehearsal)
    del rehearsal
    gc.collect()
    thread.join(10)
    assert held() is None
    assert not thread.is_alive()


def test_a_batch_that_cannot_be_copied_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise MemoryError

    with alone() as rehearsal:
        rehearsal.update(new_batch(0, 0, SIZE))
        with monkeypatch.context() as patched:
            patched.setattr(RowLayout, "pack", broken)
            with pytest.raises(MemoryError):
                rehearsal.augment(new_batch(0, 1, SIZE))
        rehearsal.step()
        rehearsal.drain()
        assert rehearsal.metrics()["rows_offered"] == SIZE


def test_metrics_tell_of_a_bounded_number_of_partitions() -> None:
    with alone(buffer={"capacity": 50, "partition_by": "id"}) as rehearsal:
        for first in range(0, 3000, 500):
            rehearsal.update({"id": torch.arange(first, first + 500)})
        rehearsal.update({"id": torch.full((9,), 7)})
        rehearsal.drain()
        rehearsal.update({"id": torch.full((9,), 8)})
        names = rehearsal.metrics()
    assert sum(name.startswith("rows_offered/") for name in names) == 1024
    assert names["rows_offered/7"] == 10


def test_a_section_that_is_switched_off_makes_no_rehearsal() -> None:
    with pytest.raises(ConfigError, match=r"rehearsal\.enabled is false.*would replay all the same; make none"):
        alone(enabled=False)


def test_several_ranks_that_are_not_connected_yet_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is 2 .*init_process_group\(\).*before the rehearsal is made"):
        Rehearsal({"buffer": {"capacity": 64}})
    with alone() as rehearsal:
        assert len(rehearsal.update(new_batch(0, 0, SIZE))["id"]) == SIZE
