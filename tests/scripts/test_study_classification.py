"""The classification study, in small: it runs on two ranks and goes on where it stopped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scripts.common.image_data import ImageData
from scripts.studies.arms import METHODS
from scripts.studies.classification_plan import ACCURACY, KNOBS, SIZES, chosen
from scripts.studies.classification_train import TASKS, Course, ResNet, hold_out
from scripts.studies.knobs import CHOOSE
from tests.helpers.script_runs import read_report, run_module


def start(out: Path, *arguments: str) -> str:
    """Run the study, small; what it printed."""
    return run_module("scripts.studies.classification", "--size", "smoke", "--out", out, *arguments)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a run."""
    folder = tmp_path_factory.mktemp("study_classification")
    (folder / "printed.txt").write_text(start(folder))
    return folder


def test_the_summary_answers_what_the_study_was_made_for(out: Path) -> None:
    summary = read_report(out)["summary"]

    assert {"er_ratio_30", "er_time_ratio", "derpp_minus_er_smallest"} <= set(summary)
    assert all(math.isfinite(value) for value in summary.values())


def test_every_arm_is_evaluated_after_every_task_and_the_upper_bound_at_its_end(out: Path) -> None:
    report = read_report(out)
    rows = [row for row in report["rows"] if row["table"] == "buffers"]
    trained: dict[tuple[str, float], list[int]] = {}
    for row in rows:
        trained.setdefault((row["method"], row["buffer_percent"]), []).append(row["after_task"])

    assert report["environment"]["ranks"] == 2
    assert {method for method, _ in trained} == set(METHODS)
    assert trained.pop(("from scratch", 0.0)) == [TASKS]
    assert all(after == [1, 2, 3, 4, 5] for after in trained.values())
    assert all(0 <= row[f"accuracy_task_{task}"] <= 1 for row in rows for task in range(1, TASKS + 1))


def test_memory_is_what_the_rows_of_both_ranks_take(out: Path) -> None:
    offered = SIZES["smoke"].steps * TASKS * SIZES["smoke"].batch * 2
    rows = [row for row in read_report(out)["rows"] if row["table"] == "buffers" and row["after_task"] == TASKS]
    images = 60_000 if rows[0]["data"] == "Fashion-MNIST" else 1_437
    image = 784 if images == 60_000 else 64
    for row in rows:
        stored = min(offered, images * row["buffer_percent"] // 100)
        state = 48 if row["method"].startswith("der") else 0  # ten scores, to the next 16 bytes
        expected = stored * (image + 16 + state) / 2**20
        assert row["buffer_mib"] == pytest.approx(expected, rel=0.1), row["method"]


def test_the_tables_and_the_picture_are_there(out: Path) -> None:
    printed = (out / "printed.txt").read_text()

    assert "Accuracy after the last task" in printed
    assert "er_time_ratio" in printed
    assert (out / "study.png").read_bytes().startswith(b"\x89PNG")


def test_a_resumed_study_trains_only_what_is_missing(out: Path) -> None:
    before = [row for row in read_report(out)["rows"] if row["table"] != "time"]
    lost = next((out / "arms").glob("incremental*"))
    lost.unlink()
    start(out, "--resume")
    after = [row for row in read_report(out)["rows"] if row["table"] != "time"]

    def untimed(row: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in row.items() if name != "seconds"}

    assert [untimed(row) for row in after] == [untimed(row) for row in before]
    retrained = [row["method"] for row, old in zip(after, before, strict=True) if row["seconds"] != old["seconds"]]
    assert retrained == ["incremental"] * TASKS
    assert lost.is_file()


@pytest.fixture
def images() -> ImageData:
    """A hundred blank images, ten of each class, told apart by their first pixel."""
    labels = np.arange(100) % 10
    pixels = np.zeros((100, 8, 8), np.uint8)
    pixels[:, 0, 0] = np.arange(100)
    return ImageData("blank", pixels, labels, pixels[:0], labels[:0])


def test_the_ranks_share_a_task_and_see_each_of_its_images_once(images: ImageData) -> None:
    courses = [Course(images, 5, 2, 2, rank, 2) for rank in range(2)]
    batches = [batch for course in courses for batch in course.task(3, seed=0)]

    assert set(torch.cat([batch["labels"] for batch in batches]).tolist()) == {6, 7}
    numbers = torch.cat([batch["images"][:, 0, 0] for batch in batches]).tolist()
    assert sorted(numbers) == [number for number in range(100) if number % 10 in (6, 7)]


def test_a_second_round_has_another_order(images: ImageData) -> None:
    numbers = torch.cat([batch["images"][:, 0, 0] for batch in Course(images, 10, 4, 2, 0, 1).task(0, seed=0)])

    assert sorted(numbers[:20].tolist()) == sorted(numbers[20:].tolist())
    assert numbers[:20].tolist() != numbers[20:].tolist()


def test_capacity_is_counted_over_all_ranks(images: ImageData) -> None:
    (arm, *_) = [arm for arm, _ in SIZES["full"].jobs() if arm.buffer_percent == 30]

    assert [Course(images, 1, 1, 1, 0, ranks).capacity(arm) for ranks in (1, 2, 3)] == [30, 15, 10]


def test_held_out_images_are_a_tenth_of_the_training_images_and_not_trained_on(images: ImageData) -> None:
    split = hold_out(images)
    train, test = (set(part[:, 0, 0].tolist()) for part in (split.train_images, split.test_images))

    assert len(test) == 10
    assert train | test == set(range(100))
    assert (split.test_labels == split.test_images[:, 0, 0] % 10).all()


def test_knobs_are_chosen_with_a_seed_that_is_not_reported() -> None:
    assert not set(SIZES[CHOOSE].seeds) & set(SIZES["full"].seeds)


def test_the_best_knobs_of_a_method_come_first() -> None:
    jobs = [(arm, knobs) for arm, knobs in SIZES[CHOOSE].choices() if arm.method == "er"]
    rows = [
        {**vars(arm), "after_task": TASKS, "seconds": 1.0, "buffer_mib": 1.0, **vars(knobs)}
        | {f"{ACCURACY.name}_task_{task}": knobs.lr + arm.buffer_percent / 100 for task in range(1, TASKS + 1)}
        for arm, knobs in jobs
    ]
    (method, knobs, accuracy), *rest = chosen(rows)

    assert method == "er"
    assert knobs.lr == max(knobs.lr for _, knobs in jobs)
    assert accuracy == pytest.approx(knobs.lr + (0.025 + 0.3) / 2)
    assert len(rest) == len(jobs) / len(SIZES[CHOOSE].buffers) - 1


def test_every_method_has_knobs() -> None:
    assert set(KNOBS) == set(METHODS)


@pytest.mark.parametrize("side", [8, 28])
def test_the_network_takes_images_of_both_data_sets(side: int) -> None:
    model = ResNet()

    assert model(torch.zeros(3, side, side, dtype=torch.uint8)).shape == (3, 10)
    assert 70_000 < sum(parameter.numel() for parameter in model.parameters()) < 80_000
