"""The quickstart: its data, its model, and a short run on two ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scripts.quickstart.data import LENGTH, Corpus, read
from scripts.quickstart.model import GPT
from tests.helpers.script_runs import read_report, run_module

STEPS = 12


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a short run under the real launcher."""
    folder = tmp_path_factory.mktemp("quickstart")
    printed = run_module("scripts.quickstart.run", "--steps", STEPS, "--out", folder, timeout_s=240)
    (folder / "printed.txt").write_text(printed)
    return folder


@pytest.fixture(scope="module")
def written(out: Path) -> dict[str, Any]:
    return read_report(out)


def test_the_summary_answers_the_questions_of_the_job(written: dict[str, Any]) -> None:
    summary = written["summary"]

    assert {"forgetting_removed", "cost_on_new", "step_time_ratio"} <= set(summary)
    assert all(math.isfinite(value) for value in summary.values())


def test_both_arms_are_evaluated_at_the_same_steps(written: dict[str, Any]) -> None:
    arms = ("both arms", "without rehearsal", "with rehearsal")
    steps = [[row["step"] for row in written["rows"] if row["arm"] == arm] for arm in arms]

    assert steps[0] == steps[1] == steps[2]
    assert steps[0][-1] == STEPS


def test_rehearsal_changes_only_the_arm_that_has_it(written: dict[str, Any]) -> None:
    summary = written["summary"]

    assert summary["rows_replayed"] == STEPS  # an eighth of eight rows in every step of phase two, none before
    assert summary["python_with"] != summary["python_without"]


def test_the_table_and_the_picture_are_there(out: Path) -> None:
    assert "forgetting of Python removed" in (out / "printed.txt").read_text()
    assert (out / "retention.png").read_bytes().startswith(b"\x89PNG")


def test_no_file_is_both_trained_on_and_held_out(tmp_path: Path) -> None:
    paths = [tmp_path / f"{index:03}.py" for index in range(200)]
    for index, path in enumerate(paths):
        path.write_text(f"{index:03}\n" * LENGTH)
    corpus = read(tmp_path, paths)
    train, held_out = (set(part.tobytes().decode().split()) for part in (corpus.train, corpus.held_out))

    assert not train & held_out
    assert len(train | held_out) == 200
    assert 5 <= len(held_out) <= 40


def test_an_installation_without_text_is_refused_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: only 0 bytes of text in 0 files"):
        read(tmp_path, [])


def test_ranks_share_the_held_out_windows() -> None:
    corpus = Corpus(np.zeros(1, np.uint8), np.arange(5000, dtype=np.uint8))
    whole = torch.cat([ids for ids, _ in corpus.held_out_batches(10, 3, 0, 1)])
    shares = [torch.cat([ids for ids, _ in corpus.held_out_batches(10, 3, rank, 3)]) for rank in range(3)]

    assert [len(share) for share in shares] == [4, 3, 3]
    assert sorted(whole.tolist()) == sorted(row for share in shares for row in share.tolist())


def test_a_batch_depends_on_its_key_alone() -> None:
    corpus = Corpus(np.random.default_rng(0).integers(256, size=9000, dtype=np.uint8), np.zeros(1, np.uint8))
    input_ids, labels = corpus.batch(4, (0, 1, 2, 0))

    assert torch.equal(input_ids, corpus.batch(4, (0, 1, 2, 0))[0])
    assert not torch.equal(input_ids, corpus.batch(4, (0, 1, 2, 1))[0])
    assert torch.equal(input_ids[:, 1:], labels[:, :-1])


def test_the_model_does_not_see_the_future() -> None:
    model = GPT(length=LENGTH)
    assert 5e5 < sum(parameter.numel() for parameter in model.parameters()) < 1e6
    input_ids = torch.randint(256, (1, LENGTH))
    changed = input_ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 256
    ignored = torch.full((1, 1), -100)
    labels = torch.cat([input_ids[:, 1:], ignored], dim=1)

    assert torch.allclose(model(input_ids, labels), model(changed, labels))
