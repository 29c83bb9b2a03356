"""Horovod ranks with a disk of their host each: saved there, and loaded by as many ranks or more."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("horovod.torch")

import rehearsal_plugin
from tests.helpers.horovod_ranks import run_horovod
from tests.integrations.horovod.test_optimizer import SECTION, STEPS, Model, half, optimizer_of


def save(root: Path) -> list[list[int]]:
    """Save into a folder of all ranks and onto this rank's disk; the rows that it sees afterwards."""
    import horovod.torch as hvd

    model = Model()
    optimizer = optimizer_of(model)
    with closing(rehearsal_plugin.attach(optimizer, model=model, config=SECTION)) as handle:
        half(model, optimizer, 0)
        handle.save(root / "shared")
        handle.save(root / f"disk{hvd.rank()}")
        return half(model, optimizer, STEPS)


def load(root: Path, disks: Sequence[int]) -> list[list[list[int]]]:
    """The rows that a rank sees after a load from the folder of all, and after one from its disk."""
    import horovod.torch as hvd

    seen = []
    for folder in (root / "shared", root / f"disk{disks[hvd.rank()]}"):
        model = Model()
        optimizer = optimizer_of(model)
        with closing(rehearsal_plugin.attach(optimizer, model=model, config=SECTION)) as handle:
            assert handle.load(folder)
            assert handle.rehearsal is not None
            assert handle.rehearsal.steps == STEPS
            seen.append(half(model, optimizer, STEPS))
    return seen


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    root = tmp_path_factory.mktemp("disks")
    return root, run_horovod(save, 2, root, timeout_s=90)


@pytest.mark.parametrize("disks", [[0, 1], [1, 0], [0, 1, 1]], ids=["as before", "other hosts", "more ranks"])
def test_ranks_go_on_from_their_disks_as_from_one_folder(disks: list[int], saved: tuple[Path, list[Any]]) -> None:
    root, expected = saved
    for rank, (shared, private) in enumerate(run_horovod(load, len(disks), root, disks, timeout_s=90)):
        assert private == shared
        assert any(len(ids) > 3 for ids in private)
        assert len(disks) != 2 or private == expected[rank], "bit for bit"
