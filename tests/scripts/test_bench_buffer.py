"""The benchmark of the buffer, on stores of a few rows."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch

from scripts.benchmarks import buffer as bench_buffer
from scripts.benchmarks.buffer import ADMISSION, COPY, FORMS, GATHERED, OURS, TOKENS, WRITTEN, Ours, summarise
from scripts.benchmarks.stores import BASELINES, PEERS, Store, installed_peers

STORES = {"rehearsal_plugin": Ours, **BASELINES, **installed_peers()}


def test_its_report_has_the_figures_that_it_is_run_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_buffer.main(["--rounds", "2", "--store-mb", "1", "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert {"cells", "vs_copy_min", "admission_us_max"} <= set(report["summary"])
    assert "vs_best_peer_min" not in report["summary"], "no peer was asked for"
    assert len(report["rows"]) == (len(FORMS) + 1) * 3 * (1 + len(BASELINES)) + len(bench_buffer.ADMISSIONS)
    assert "vs_copy_min" in capsys.readouterr().out


def test_the_worst_cell_counts_against_the_fastest_peer_of_it() -> None:
    times = {
        ("small", "W14"): {OURS: 2.0, COPY: 1.5, "raw numpy": 0.1, "cpprb": 3.0, "torchrl": 9.0},
        ("large", "G7"): {OURS: 4.0, COPY: 4.0, "raw numpy": 0.1, "cpprb": 9.0, "torchrl": 3.0},
    }
    rows = [
        {"rows": form, "what": what, "store": store, "ms": ms}
        for (form, what), cell in times.items()
        for store, ms in cell.items()
    ]
    rows += [
        {"rows": "small", "what": ADMISSION, "store": policy, "ms": ms} for policy, ms in (("a", 0.01), ("b", 0.02))
    ]
    assert summarise(rows) == pytest.approx(
        {"cells": 2, "cells_ahead": 1, "vs_best_peer_min": 0.75, "vs_copy_min": 0.75, "admission_us_max": 20}
    )


@pytest.mark.parametrize("name", STORES)
@pytest.mark.parametrize("form", FORMS)
def test_every_store_writes_and_gathers_whole_samples(name: str, form: str) -> None:
    made: Store = STORES[name](128, FORMS[form].batch(128))
    made.write(FORMS[form].batch(WRITTEN))
    gathered = made.gather(GATHERED[0])
    whole = isinstance(gathered, np.ndarray | torch.Tensor)
    columns = [gathered] if whole else gathered if isinstance(gathered, list) else list(gathered.values())
    total = sum(torch.as_tensor(column).nbytes for column in columns)
    assert total >= 7 * sum(column.nbytes for column in FORMS[form].batch(1).values())


def test_peers_that_are_not_installed_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.benchmarks.stores.find_spec", lambda package: None)
    assert list(installed_peers()) == [name for name, (package, _) in PEERS.items() if package is None]


@pytest.mark.parametrize("what", bench_buffer.WHAT)
def test_in_the_steady_state_the_buffer_allocates_no_memory_for_rows(what: str) -> None:
    form = FORMS[TOKENS]
    store, batch = Ours(256, form.batch(128)), form.batch(WRITTEN)
    call = bench_buffer.operation(store, what, batch)
    for _ in range(50):
        call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        tracemalloc.start()
        for _ in range(50):  # now and then two rows meet in a slot, so that one is not kept
            call()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    allocated = sum(max(0, event.self_device_memory_usage + event.self_cpu_memory_usage) for event in profile.events())
    assert peak + allocated < form.row_bytes


@pytest.mark.parametrize("what", bench_buffer.WHAT)
def test_in_the_steady_state_no_page_is_faulted_in_and_no_call_waits_for_the_kernel(what: str) -> None:
    form = FORMS[TOKENS]
    store, batch = Ours(256, form.batch(128)), form.batch(WRITTEN)
    call = bench_buffer.operation(store, what, batch)
    turns = [entries_to_the_kernel(call) for _ in range(10)]
    assert (0, 0, 0) in turns, turns  # others may come from whatever else the machine does


EXIT_GROUP = {"x86_64": 231, "aarch64": 94}
"""The system call that ends a process, by machine."""


@pytest.mark.skipif(platform.machine() not in EXIT_GROUP, reason="its number of exit_group is not known here")
@pytest.mark.parametrize("what", bench_buffer.WHAT)
def test_in_the_steady_state_the_buffer_makes_no_system_call(what: str) -> None:
    form = FORMS[TOKENS]
    store, batch = Ours(256, form.batch(128)), form.batch(WRITTEN)
    call = bench_buffer.operation(store, what, batch)
    child = os.fork()
    if not child:
        call_alone(call)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "killed by the first system call, or an error"


def call_alone(call: Callable[[], object]) -> NoReturn:
    """Call it until it is in its steady state, then without the kernel, and end this process: 0 if all went well."""
    try:
        for _ in range(50):
            call()
        only_exit()
        for _ in range(100):
            call()
        os._exit(0)
    finally:
        os._exit(1)


def only_exit() -> None:
    """From now on the kernel kills this process when it asks for anything but its end, by a seccomp filter."""
    program = [(0x20, 0, 0, 0), (0x15, 0, 1, EXIT_GROUP[platform.machine()]), (6, 0, 0, 0x7FFF0000), (6, 0, 0, 1 << 31)]
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    filter_program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(filters)))
    no_new_privileges, set_seccomp, by_filter = 38, 22, 2
    prctl = ctypes.CDLL(None).prctl
    if prctl(no_new_privileges, 1, 0, 0, 0) or prctl(set_seccomp, by_filter, filter_program):
        os._exit(2)


def entries_to_the_kernel(call: Callable[[], object], calls: int = 100) -> tuple[int, int, int]:
    """Page faults without and with a disk, and system calls that gave up the core, of this thread."""
    before = resource.getrusage(resource.RUSAGE_THREAD)
    for _ in range(calls):
        call()
    after = resource.getrusage(resource.RUSAGE_THREAD)
    return tuple(getattr(after, name) - getattr(before, name) for name in ("ru_minflt", "ru_majflt", "ru_nvcsw"))
