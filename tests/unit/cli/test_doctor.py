"""`rehearsal doctor`: what it finds, and that each finding that is not fine has a cure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from rehearsal_plugin import RehearsalConfig
from rehearsal_plugin.cli.doctor import command, machine, packages, ranks
from rehearsal_plugin.cli.doctor.finding import Finding
from scripts.common.launch import free_port
from tests.helpers.paths import ROOT
from tests.unit.cli.test_cli import call

TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port")


def levels(findings: Iterable[Finding], topic: str) -> list[str]:
    listed = [finding for finding in findings if finding.topic == topic]
    assert all(finding.cure for finding in listed if finding.level != "fine")
    return [finding.level for finding in listed]


@pytest.fixture
def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(_: int) -> Iterator[Finding]:
        yield from ()

    monkeypatch.setattr(command, "check_exchange", nothing)


def start(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = [sys.executable, *map(str, arguments)]
    return subprocess.run(done, env=environment, capture_output=True, text=True, timeout=240, check=False)


# --- exchange --------------------------------------------------------------------------------------------------------


def test_two_processes_exchange_rows_and_the_machine_is_fine() -> None:
    done = start("-m", "rehearsal_plugin.doctor", ROOT / "configs" / "quickstart.json", "--row-bytes", "2KiB", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = [Finding(**one) for one in json.loads(done.stdout)]
    assert not [finding for finding in found if finding.level == "problem"]
    assert {"versions", "frameworks", "compiler", "config", "memory", "paths", "exchange"} <= {
        one.topic for one in found
    }
    assert any(one.text.startswith("gloo: 2 ranks exchanged rows") for one in found)


def test_under_a_launcher_all_ranks_are_looked_at_and_rank_0_tells(tmp_path: Path) -> None:
    section = tmp_path / "section.json"
    section.write_text(json.dumps({"buffer": {"capacity": "1GiB", "preload": "/no/such/folder"}}))
    done = start(*TORCHRUN, free_port(), "-m", "rehearsal_plugin.doctor", section, "--json")
    assert done.returncode != 0
    found = [Finding(**one) for one in json.loads(done.stdout)]
    broken = [one.text for one in found if one.level == "problem"]
    assert broken == [
        "rehearsal.buffer.preload /no/such/folder cannot be read",
        "rank 1: rehearsal.buffer.preload /no/such/folder cannot be read",
    ]
    assert any(one.text.startswith("gloo: 2 ranks exchanged rows") for one in found)


def test_an_exchange_that_fails_is_a_problem_with_a_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_start_ranks", lambda backend, ranks: {"error": "RuntimeError: no route to host"})
    found = list(ranks.check_exchange(2))
    assert levels(found, "exchange")[-1] == "problem"
    assert "gloo: RuntimeError: no route to host" in found[-1].text
    assert "GLOO_SOCKET_IFNAME" in found[-1].cure


def test_a_rank_alone_gets_no_row_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    try:
        assert "got no row of another rank" in ranks.exchange("gloo")["error"]
    finally:
        dist.destroy_process_group()


# --- packages --------------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that packages have other versions; None for one that is not there."""

    def pretend(**versions: str | None) -> None:
        def version(name: str) -> str:
            known = versions.get(name.replace("-", "_"), "99")
            if known is None:
                raise metadata.PackageNotFoundError(name)
            return known

        monkeypatch.setattr(metadata, "version", version)

    return pretend


def told(name: str) -> Finding:
    return next(finding for finding in packages.check_packages() if f"{name} " in finding.text)


@pytest.mark.parametrize(
    ("version", "level", "cure"),
    [
        ("99", "fine", ""),
        ("1.0", "problem", "pip install --upgrade 'torch>="),
        (None, "problem", "pip install 'torch>="),
    ],
)
def test_what_is_required_is_compared(
    installed: Callable[..., None], version: str | None, level: str, cure: str
) -> None:
    installed(torch=version)
    finding = told("torch")
    assert (finding.level, finding.cure[: len(cure)]) == (level, cure)


@pytest.mark.parametrize(("version", "level"), [("99", "fine"), ("0.1", "problem"), (None, "fine")])
def test_frameworks_are_compared_and_none_is_required(
    installed: Callable[..., None], version: str | None, level: str
) -> None:
    installed(deepspeed=version)
    finding = told("deepspeed")
    assert finding.level == level
    assert version is not None or "rehearsal_plugin[deepspeed]" in finding.text


def test_every_extra_of_a_user_is_told(installed: Callable[..., None]) -> None:
    installed(**{name.replace("-", "_"): None for name in packages.FRAMEWORKS})
    text = " ".join(finding.text for finding in packages.check_packages())
    extras = set(metadata.metadata("rehearsal_plugin").get_all("Provides-Extra") or ()) - {
        "dev",
        "docs",
        "plot",
        "horovod",
    }
    assert not {extra for extra in extras if f"rehearsal_plugin[{extra}]" not in text}
    assert "install_horovod.sh" in text


def test_a_package_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert levels(packages.check_packages(), "versions") == ["fine", "warning"]


@pytest.mark.parametrize(("compiled", "level"), [(True, "fine"), (False, "warning")])
def test_copies_by_numpy_are_a_warning(monkeypatch: pytest.MonkeyPatch, compiled: bool, level: str) -> None:
    monkeypatch.setattr(packages, "COMPILED", compiled)
    assert levels(packages.check_copies(), "compiler") == [level]


# --- machine ---------------------------------------------------------------------------------------------------------


def memory_level(section: dict[str, Any], ranks: int = 2, row_bytes: int | None = None) -> str:
    (level,) = levels(machine.check_memory(RehearsalConfig.load(section), ranks, row_bytes), "memory")
    return level


def test_buffers_are_compared_with_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda: 10 << 30)
    assert memory_level({"buffer": {"capacity": "1GiB"}}) == "fine"
    assert memory_level({"buffer": {"capacity": "1GiB"}}, ranks=9) == "warning"
    assert memory_level({"buffer": {"capacity": "6GiB"}}) == "problem"
    assert memory_level({"buffer": {"capacity": 1000}}) == "warning"
    assert memory_level({"buffer": {"capacity": 1000}}, row_bytes=1000) == "fine"
    assert memory_level({"buffer": {"capacity": 1000}}, row_bytes=1 << 30) == "problem"


def test_free_memory_is_that_of_this_machine() -> None:
    free = machine.free_memory()
    assert free is not None
    assert 0 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_the_disk_counts_for_files(tmp_path: Path) -> None:
    buffer = {"storage": "mmap", "path": str(tmp_path / "rows")}
    assert memory_level({"buffer": {**buffer, "capacity": "1MiB"}}) == "fine"
    assert memory_level({"buffer": {**buffer, "capacity": "900PB"}}) == "problem"


def test_paths_are_tried(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "weights.json").write_text("{}")
    section = {
        "buffer": {"storage": "mmap", "path": str(tmp_path / "file" / "rows"), "partition_by": "d"},
        "sampling": {"weights": "balanced", "weights_file": str(tmp_path / "weights.json")},
    }
    found = {finding.text: finding.level for finding in machine.check_paths(RehearsalConfig.load(section))}
    assert found[f"rehearsal.buffer.path {tmp_path}/file/rows cannot be written"] == "problem"
    assert found[f"rehearsal.sampling.weights_file {tmp_path}/weights.json can be read"] == "fine"


@pytest.mark.usefixtures("no_exchange")
def test_a_config_that_cannot_be_used_is_a_problem_among_others(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"rehearsal": {"ration": 0.1}}')
    shown = call("doctor", tmp_path / "ds.json", code=1)
    assert "did you mean 'rehearsal.ratio'?" in shown
    assert "1 problems" in shown
    assert "versions" in shown
