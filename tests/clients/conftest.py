"""The tiny model and its data, made once."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `model` and data; see `tests.helpers.clients.tiny_llm`."""
    from tests.helpers.clients.tiny_llm import make_tiny_llm

    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_llm(folder)
    return folder
