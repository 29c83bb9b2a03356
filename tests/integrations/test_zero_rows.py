"""Micro-batches and steps of no rows, in every framework: each is a step like any other."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

from tests.helpers.sparse_jobs import JOBS
from tests.unit.runtime.test_zero_rows import PHASES, SECTIONS, STATEFUL, STEPS, offered

NEEDS_LOSSES_APART = {"er-ace", "der++", "x-der", "policy score"}


CASES = [
    (job, name, mode)
    for job in JOBS
    for name in SECTIONS
    for mode in ("append", "replace")
    if not (job == "forward" and name in NEEDS_LOSSES_APART)
    if not (job == "horovod" and mode == "replace")  # as "forward, loss outside"
]


@pytest.mark.parametrize("phases", PHASES)
@pytest.mark.parametrize(("job", "name", "mode"), CASES)
def test_no_rows_are_a_step_like_any_other(job: str, name: str, mode: str, phases: str) -> None:
    if "retrieval" in SECTIONS[name] and not find_spec("faiss"):
        pytest.skip("needs faiss")
    amount: dict[str, Any] = {"ratio": 0.3, "mode": mode}
    metrics = JOBS[job](name, phases, amount)
    if (job, name, mode) == ("loader", "candidates", "replace"):
        return  # the loader makes batches of its own, and each has its candidates
    unseen = metrics["rows_displaced"] if name in STATEFUL else 0  # they have no outputs that could be stored
    assert metrics["rows_offered"] + metrics["rows_duplicate"] == offered(name, PHASES[phases]) - unseen
    assert job == "loader" or metrics["steps"] >= STEPS - 1
