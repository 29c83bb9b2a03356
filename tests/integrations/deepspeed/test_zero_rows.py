"""Micro-batches of no rows in DeepSpeed engines, with rows at the model's forward and in the loader."""

from __future__ import annotations

import itertools
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.sparse_jobs import SparseModel, batches, criterion, section_of
from tests.helpers.witness import MADE, config_of, engine_of, perform
from tests.unit.runtime.test_zero_rows import PHASES, SECTIONS, STATEFUL, offered

pytest.importorskip("deepspeed")

NAMES = [name for name in SECTIONS if "retrieval" not in SECTIONS[name] or find_spec("faiss")]
WAYS: dict[str, dict[str, Any]] = {
    "forward, append": {"ratio": 0.3},
    "forward, replace": {"ratio": 0.3, "mode": "replace"},
    "loader, append": {"ratio": 0.3, "inject": "loader"},
}
FED = [phase for phase in PHASES if phase != "steps without a batch"]
CASES = {f"{name}; {phase}; {way}": (name, phase, way) for name in NAMES for phase in FED for way in WAYS}


def train(_: Path, name: str, phase: str, way: str) -> dict[str, float]:
    """Each micro-batch is one of two of a step."""
    keys = section_of(name, WAYS[way])
    engine = engine_of(config_of(keys, gas=2), SparseModel(outside=True))
    read = itertools.chain.from_iterable(batches(name, phase))
    for fields in engine.rehearsal.loader(read) if "inject" in keys else read:
        engine.backward(engine.rehearsal.loss(criterion, *engine(**fields)))
        engine.step()
    while MADE:
        MADE.pop().destroy()
    metrics: dict[str, float] = engine.rehearsal.metrics()
    return metrics


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    cases = {case: partial(train, name=name, phase=phase, way=way) for case, (name, phase, way) in CASES.items()}
    return run_ranks(perform, 1, cases, tmp_path_factory.mktemp("jobs"), timeout_s=300)[0]


@pytest.mark.parametrize("case", CASES)
def test_no_rows_are_a_micro_batch_like_any_other(jobs: Any, case: str) -> None:
    metrics, (name, phase, _) = jobs[case], CASES[case]
    assert isinstance(metrics, dict), metrics.trace
    unseen = metrics["rows_displaced"] if name in STATEFUL else 0
    assert metrics["rows_offered"] + metrics["rows_duplicate"] == offered(name, PHASES[phase]) - unseen
