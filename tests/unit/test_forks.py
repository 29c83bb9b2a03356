"""A rehearsal in a forked child of its process: refused at once, and no reason to wait at the end."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset, default_collate

from rehearsal_plugin import LocalTransport, Rehearsal
from rehearsal_plugin.checkpoint import saver
from rehearsal_plugin.core.background_thread import BackgroundThread
from rehearsal_plugin.errors import ClosedError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

BATCH = {"x": torch.zeros(8, 1)}
PATIENCE_S = 8.0


@pytest.fixture
def rehearsal() -> Iterator[Rehearsal]:
    section = {"buffer": {"capacity": 100}, "representatives": 2, "checkpoint": {"asynchronous": True}}
    with Rehearsal(section, LocalTransport()) as made:
        made.update(BATCH)
        yield made


def in_child(act: Callable[[], Any]) -> str:
    """What a forked child says of a call; it must end by itself."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            answer = repr(act())
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writing, answer.encode())
        os._exit(0)
    _wait_for(child)
    os.close(writing)
    with os.fdopen(reading) as answers:
        return answers.read()


def _wait_for(child: int) -> int:
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise AssertionError("the child did not end")


CALLS: dict[str, Callable[[Rehearsal, Path], Any]] = {
    "update": lambda rehearsal, _: rehearsal.update(BATCH),
    "augment": lambda rehearsal, _: rehearsal.augment(BATCH),
    "visible": lambda rehearsal, _: rehearsal.visible(BATCH),
    "loss": lambda rehearsal, _: rehearsal.loss(lambda a, b: a, BATCH["x"], BATCH["x"]),
    "complete": lambda rehearsal, _: rehearsal.complete({}),
    "record": lambda rehearsal, _: rehearsal.record(BATCH["x"]),
    "drop": lambda rehearsal, _: rehearsal.drop(),
    "give_up_step": lambda rehearsal, _: rehearsal.give_up_step(),
    "step": lambda rehearsal, _: rehearsal.step(),
    "due": lambda rehearsal, _: rehearsal.due(),
    "reweigh": lambda rehearsal, _: rehearsal.reweigh({"0": 1}),
    "metrics": lambda rehearsal, _: rehearsal.metrics(),
    "drain": lambda rehearsal, _: rehearsal.drain(),
    "flush": lambda rehearsal, _: rehearsal.flush(),
    "commit": lambda rehearsal, _: rehearsal.commit(),
    "rollback": lambda rehearsal, _: rehearsal.rollback(),
    "restart": lambda rehearsal, _: rehearsal.restart(0),
    "fingerprint": lambda rehearsal, _: rehearsal.fingerprint(),
    "save": lambda rehearsal, folder: rehearsal.save(folder),
    "load": lambda rehearsal, folder: rehearsal.load(folder),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_call_in_a_child_is_refused_at_once_naming_both_processes(
    name: str, rehearsal: Rehearsal, tmp_path: Path
) -> None:
    answer = in_child(lambda: CALLS[name](rehearsal, tmp_path))
    assert answer.startswith(f"ClosedError: this rehearsal belongs to process {os.getpid()}, and process ")
    assert "forked copy" in answer


def test_a_close_in_a_child_does_nothing_and_the_parent_goes_on(rehearsal: Rehearsal) -> None:
    assert in_child(rehearsal.close) == "None"
    assert in_child(lambda: rehearsal.closed) == "False"
    rehearsal.update(BATCH)
    assert len(rehearsal.update(BATCH)["x"]) == 10


def test_a_child_ends_while_the_parent_saves_in_the_background(
    rehearsal: Rehearsal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, write = threading.Event(), saver._write_and_prune

    def slowly(save: Any, after: int) -> Any:
        go_on.wait(30)
        return write(save, after)

    monkeypatch.setattr(saver, "_write_and_prune", slowly)
    rehearsal.save(tmp_path)
    child = os.fork()
    if not child:
        import atexit

        try:
            atexit._run_exitfuncs()  # as sys.exit would, without the tests of the parent
        finally:
            os._exit(0)
    try:
        assert _wait_for(child) == 0
    finally:
        go_on.set()
    rehearsal.flush()
    assert len(list(tmp_path.glob("rehearsal-*.safetensors"))) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux")
def test_a_collate_function_in_a_worker_says_so(rehearsal: Rehearsal) -> None:
    loader = DataLoader(
        TensorDataset(torch.zeros(16, 1)),
        batch_size=8,
        num_workers=1,
        collate_fn=lambda samples: rehearsal.update({"x": default_collate(samples)[0]}),
        multiprocessing_context="fork",
    )
    with pytest.raises(ClosedError, match="forked copy"):
        list(loader)


def test_a_background_thread_is_not_there_in_a_child() -> None:
    thread: BackgroundThread[int] = BackgroundThread("test")
    assert in_child(lambda: thread.submit(lambda: 1)).startswith("ClosedError: process ")
    assert in_child(lambda: thread.close(60.0)) == "True"
    assert thread.submit(lambda: 1).result(5) == 1
    assert thread.close(5.0)
