"""A rank whose section cannot be used, beside ranks whose section is right."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from rehearsal_plugin.errors import RehearsalError
from rehearsal_plugin.strategies import ExperienceReplay, register
from tests.helpers.ranks import run_ranks
from tests.helpers.witness import BLOCK, config_of, engine_of, perform

pytest.importorskip("deepspeed")


class Broken(ExperienceReplay):
    """Fails where it is made, as for want of a file."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise FileNotFoundError("teacher.pt")


BAD: dict[str, dict[str, Any]] = {
    "a value": {"ratio": 7},
    "a name": {"strategy": {"name": "nowhere"}},
    "a strategy": {"strategy": {"name": "broken"}},
}


def attach(folder: Path) -> str:
    register("broken")(Broken)
    start = time.monotonic()
    try:
        engine_of(config_of({**BLOCK, **(BAD[folder.name] if dist.get_rank() == 1 else {})}))
    except (RehearsalError, FileNotFoundError) as error:
        return f"{time.monotonic() - start < 20} {type(error).__name__}: {error}"
    return "no error"


def test_the_others_hear_of_it_at_once(tmp_path: Path) -> None:
    right, wrong = run_ranks(perform, 2, dict.fromkeys(BAD, attach), tmp_path, timeout_s=120)
    for name in BAD:
        assert wrong[name].startswith(("True ConfigError", "True FileNotFoundError")), wrong[name]
        assert right[name].startswith("True ExchangeError: rank 1 failed before its first exchange"), right[name]
