"""Checkpoints of an earlier release go on, and every job gives what it gave: same batches, losses and counts.

That release drew rows for all ranks at once. So the rows that its checkpoints have on their way come out bit for bit,
for three steps, and those drawn since then are others.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers.earlier_jobs import JOBS, drive, drive_all, job
from tests.helpers.ranks import run_ranks

EARLIER = Path(__file__).parent / "earlier"
DIGESTS = json.loads((EARLIER / "digests.json").read_text())


@pytest.mark.parametrize("name", JOBS)
def test_a_job_gives_what_it_gave_before(name: str) -> None:
    with job(name) as rehearsal:
        assert drive(rehearsal, 0, 24) == DIGESTS[name]["from the start"]


@pytest.mark.parametrize("name", JOBS)
def test_a_checkpoint_of_an_earlier_release_goes_on(name: str) -> None:
    with job(name) as rehearsal:
        rehearsal.load(EARLIER / name)
        steps = drive(rehearsal, 12, 12)
    assert steps[:3] == DIGESTS[name]["on their way"], "rows that were on their way then"
    assert steps == DIGESTS[name]["resumed"]


def test_jobs_of_two_ranks_give_what_they_gave_before() -> None:
    names = [name for name in DIGESTS["two ranks"] if name != "nearest" or find_spec("faiss")]
    ranks = run_ranks(drive_all, 2, names)
    for name in names:
        assert [rank[name] for rank in ranks] == DIGESTS["two ranks"][name], name
