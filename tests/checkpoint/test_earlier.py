"""Checkpoints of the release before go on bit for bit, and so does every job: same batches, losses and counts."""

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
        assert drive(rehearsal, 0, 24) == DIGESTS[name]["before"] + DIGESTS[name]["after"]


@pytest.mark.parametrize("name", JOBS)
def test_a_checkpoint_goes_on_as_it_did_before(name: str) -> None:
    with job(name) as rehearsal:
        rehearsal.load(EARLIER / name)
        assert drive(rehearsal, 12, 12) == DIGESTS[name]["after"]


def test_jobs_of_two_ranks_give_what_they_gave_before() -> None:
    names = [name for name in DIGESTS["two ranks"] if name != "nearest" or find_spec("faiss")]
    ranks = run_ranks(drive_all, 2, names)
    for name in names:
        assert [rank[name] for rank in ranks] == DIGESTS["two ranks"][name], name
