"""The mark by which a process tells that it has a rehearsal."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rehearsal_plugin.core.attached import FOLDER, note_attached


def test_a_process_leaves_its_number_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    note_attached()
    note_attached()
    assert [path.name for path in tmp_path.iterdir()] == [str(os.getpid())]


@pytest.mark.parametrize("folder", [None, "", "gone"])
def test_without_a_folder_nothing_is_written(
    folder: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if folder is None:
        monkeypatch.delenv(FOLDER, raising=False)
    else:
        monkeypatch.setenv(FOLDER, folder)
    note_attached()
    assert not list(tmp_path.iterdir())
