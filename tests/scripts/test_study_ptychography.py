"""The ptychography study: simulated patterns, streams that drift, the network, and a small run on two ranks."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chi2, norm

from scripts.studies import diffraction as ptychography
from scripts.studies.arms import ER, INCREMENTAL, METHODS, Arm, Row, evaluation_row
from scripts.studies.diffraction import (
    CROP,
    WINDOW,
    Condition,
    Samples,
    beam,
    empty_pattern,
    intensities,
    scan,
    texture,
)
from scripts.studies.plots import plot_study
from scripts.studies.ptychography_plan import COMMON, METRICS, SIZES, summarise
from scripts.studies.reconstruction_model import PtychoNet, reconstruction_loss
from scripts.studies.results import group_seeds
from scripts.studies.scan_stream import DRIFTS, Plan, Producer, conditions
from tests.helpers.chance import SIGNIFICANCE
from tests.helpers.script_runs import read_report, run_module

PLAN = Plan(tuple(conditions("texture", 2)), steps=5, batch=24, seed=1, rank=0)


def start(out: Path, *arguments: str) -> str:
    """Run the study, small; what it printed."""
    return run_module("scripts.studies.ptychography", "--size", "smoke", "--out", out, *arguments)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a run."""
    folder = tmp_path_factory.mktemp("study_ptychography")
    (folder / "printed.txt").write_text(start(folder))
    return folder


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects without texture: every window is the same."""
    monkeypatch.setattr(
        ptychography, "texture", lambda count, pixels, *_: np.zeros((count, pixels, pixels), np.float32)
    )


def test_three_steps_learn_nothing_that_could_be_forgotten_and_the_study_says_so(out: Path) -> None:
    summary, printed = read_report(out)["summary"], (out / "printed.txt").read_text()

    assert all(summary[f"learnt_phase_{drift}"] == 0 for drift in DRIFTS)
    assert "forgetting_reduction_phase" not in summary
    assert re.search(r"^forgetting_reduction_phase +not learnt$", printed, re.MULTILINE)
    assert re.search(r"incremental .*not learnt", printed)


def test_every_arm_tells_both_errors_of_every_task(out: Path) -> None:
    tasks = SIZES["smoke"].course.tasks
    lines = {(line["drift"], line["method"], line["after_task"]): line for line in read_report(out)["rows"]}

    for drift in DRIFTS:
        for method in METHODS:
            last = lines[drift, method, tasks]
            errors = [
                last[f"{name}_error_task_{task}"] for name in ("amplitude", "phase") for task in range(1, tasks + 1)
            ]
            assert all(0 < error < 1 for error in errors)
        assert {task for of, method, task in lines if (of, method) == (drift, ER)} == set(range(1, tasks + 1))


def test_the_small_size_is_drawn_with_the_methods_that_it_has(tmp_path: Path) -> None:
    rows = [
        line
        for _, arm, _ in SIZES["small"].jobs()
        for line in _rows(arm, (0.2, 0.1, 0.6) if arm.method != "from scratch" else (0.1,))
    ]
    (metric, _) = METRICS
    plot_study(group_seeds(rows, metric), metric, "small", tmp_path / "small.png")

    assert (tmp_path / "small.png").stat().st_size > 1000


def test_rehearsal_begins_after_the_first_task(out: Path) -> None:
    lines = {(line["drift"], line["method"], line["after_task"]): line for line in read_report(out)["rows"]}

    for drift in DRIFTS:
        first, second = ([lines[drift, m, t]["phase_error_task_1"] for m in (INCREMENTAL, ER)] for t in (1, 2))
        assert first[0] == first[1]
        assert second[0] != second[1]


def test_pictures_are_there(out: Path) -> None:
    for drift in DRIFTS:
        for name in ("amplitude", "phase"):
            assert (out / f"{drift}_{name}_error.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_study_trains_only_what_is_missing(out: Path) -> None:
    before = read_report(out)["rows"]
    arms = sorted((out / "arms").rglob("*.json"))
    arms[0].unlink()
    old = {arm: arm.read_bytes() for arm in arms[1:]}
    start(out, "--resume")
    after = read_report(out)["rows"]

    assert all(arm.read_bytes() == content for arm, content in old.items())
    assert _without_times(after) == _without_times(before)


@pytest.mark.parametrize("amplitude", [1.0, 0.5])
@pytest.mark.parametrize("defocus", [0.0, 4.0])
def test_the_detector_gets_all_photons_that_the_object_lets_through(amplitude: float, defocus: float) -> None:
    windows = np.full((2, WINDOW, WINDOW), amplitude, np.complex64)
    sums = intensities(windows, Condition(defocus=defocus, photons=500.0)).sum(axis=(1, 2))

    assert sums == pytest.approx(500 * amplitude**2, rel=1e-4)


def test_counts_are_poisson(plain: None) -> None:
    """Their mean and their variance are what is expected; p-values two-sided, from 64 patterns."""
    condition = Condition(photons=2e4)
    counts = scan(condition, 8, np.random.default_rng(0)).diffraction.astype(np.float64) ** 2
    mean = (1 + ptychography.DARKEST) / 2
    expected = (mean * empty_pattern(condition.photons).astype(np.float64)) ** 2
    lit = expected > 5
    deviations = (counts[:, lit] - expected[lit]) ** 2 / expected[lit]
    z = (counts.sum() - len(counts) * expected.sum()) / math.sqrt(len(counts) * expected.sum())
    below = chi2.cdf(deviations.sum(), deviations.size)

    assert deviations.size > 10_000
    assert 2 * norm.sf(abs(z)) > SIGNIFICANCE
    assert 2 * min(below, 1 - below) > SIGNIFICANCE


def test_more_photons_more_counts(plain: None) -> None:
    few, many = (scan(Condition(photons=n), 4, np.random.default_rng(0)).diffraction for n in (1e3, 1e5))

    assert (many**2).sum() / (few**2).sum() == pytest.approx(100, rel=0.02)


@pytest.mark.parametrize("defocus", [0.5, 1.0, 2.0])
def test_defocus_widens_the_beam_as_gaussian_optics_says(defocus: float) -> None:
    along = np.arange(WINDOW) - WINDOW // 2
    squares = along[:, None] ** 2 + along**2
    focused, defocused = ((np.abs(beam(d)) ** 2 * squares).sum() for d in (0.0, defocus))

    assert defocused / focused == pytest.approx(1 + 4 * defocus**2, rel=0.02)


def test_defocus_does_not_change_the_pattern_of_the_empty_beam() -> None:
    empty = np.ones((1, WINDOW, WINDOW), np.complex64)
    patterns = [intensities(empty, Condition(defocus=defocus)) for defocus in (0.0, 4.0)]

    np.testing.assert_allclose(patterns[0], patterns[1], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("exponent", [1.0, 2.5, 4.0])
def test_the_power_of_a_texture_falls_with_its_exponent(exponent: float) -> None:
    fields = texture(200, 64, exponent, np.random.default_rng(0))
    power = (np.abs(np.fft.fft2(fields)) ** 2).mean(axis=0)[0, 1:32]
    slope = np.polyfit(np.log(np.arange(1, 32)), np.log(power), 1)[0]

    assert slope == pytest.approx(-exponent, abs=0.1)
    assert fields.mean(axis=(1, 2)) == pytest.approx(0, abs=1e-5)
    assert (fields**2).mean() == pytest.approx(1, abs=0.1)


def test_a_sample_is_a_pattern_and_its_two_maps() -> None:
    samples = scan(Condition(), 3, np.random.default_rng(0))

    assert [field.shape for field in samples] == [(9, WINDOW, WINDOW), (9, CROP, CROP), (9, CROP, CROP)]
    assert all(field.dtype == np.float32 for field in samples)
    assert ptychography.DARKEST <= samples.amplitude.min() <= samples.amplitude.max() <= 1
    assert samples.phase.mean(axis=(1, 2)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("drift", DRIFTS)
def test_a_drift_goes_from_one_end_to_the_other_and_moves_nothing_else(drift: str) -> None:
    ((name, (first, last)),) = DRIFTS[drift].items()
    tasks = conditions(drift, 5)
    values = [getattr(task, name) for task in tasks]
    moved = np.diff(np.log(values) if name == "photons" else values)

    assert (values[0], values[-1]) == (pytest.approx(first), pytest.approx(last))
    assert moved == pytest.approx(np.full(4, moved.mean()))
    assert all(replace(task, **{name: first}) == replace(tasks[0], **{name: first}) for task in tasks)


def test_a_plan_gives_the_same_samples_each_time_and_others_to_other_ranks() -> None:
    ours, repeated, other = (_all(plan.in_order()) for plan in (PLAN, PLAN, replace(PLAN, rank=1)))

    assert len(ours.phase) == 2 * 5 * 24
    assert _prints(ours) == _prints(repeated)
    assert len(set(_prints(ours))) == 240
    assert not set(_prints(ours)) & set(_prints(other))


def test_shuffled_tasks_hold_the_same_samples_as_often_as_each_other() -> None:
    ordered, shuffled = _prints(_all(PLAN.in_order())), _prints(_all(PLAN.shuffled(48)))

    assert len(shuffled) == 480
    assert sorted(shuffled) == sorted(ordered * 2)
    assert shuffled[:240] != ordered


def test_held_out_samples_are_not_trained_on() -> None:
    held_out = PLAN.held_out(2)

    assert [len(samples.phase) for samples in held_out] == [128, 128]
    assert not set(_prints(_all(iter(held_out)))) & set(_prints(_all(PLAN.in_order())))


def test_a_producer_delivers_one_plan_after_the_other() -> None:
    with Producer() as producer:
        delivered = [_prints(_all(producer.stream(PLAN))), _prints(_all(producer.stream(PLAN, shuffled=48)))]

    assert delivered == [_prints(_all(PLAN.in_order())), _prints(_all(PLAN.shuffled(48)))]
    assert producer.waited_s > 0


def test_a_producer_that_died_is_named() -> None:
    with Producer() as producer:
        stream = producer.stream(PLAN)
        next(stream)
        producer.close()
        with pytest.raises(RuntimeError, match="simulation ended with exit code -15"):
            list(stream)


def test_the_network_gives_both_maps_and_learns_from_both() -> None:
    model = PtychoNet()
    samples = scan(Condition(), 2, np.random.default_rng(0))
    diffraction, amplitude, phase = (torch.from_numpy(field) for field in samples)
    maps = model(diffraction)
    reconstruction_loss(maps, amplitude, phase).backward()  # type: ignore[no-untyped-call]

    assert [tuple(one.shape) for one in maps] == [(4, CROP, CROP)] * 2
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    assert reconstruction_loss((amplitude, phase), amplitude, phase) == 0


def test_the_summary_counts_forgetting_from_the_best_value_since_a_task_was_learnt() -> None:
    paths = {INCREMENTAL: (0.2, 0.1, 0.6), ER: (0.2, 0.1, 0.3)}
    rows = [
        {"drift": drift, **line}
        for drift in DRIFTS
        for method, path in paths.items()
        for line in _rows(Arm(method, COMMON if method == ER else 0.0, 0), path)
    ]
    summary = summarise(rows)

    assert summary["forgetting_phase_defocus_incremental"] == pytest.approx(0.25)  # task 2 does not change
    assert summary["forgetting_reduction_phase"] == pytest.approx(0.6)
    assert summary["learnt_phase_defocus"] == 1.0


def test_a_share_is_that_of_the_drifts_that_were_learnt() -> None:
    paths = {INCREMENTAL: (0.2, 0.1, 0.6), ER: (0.2, 0.1, 0.3)}
    rows = [
        {"drift": drift, **line, **{f"phase_error_constant_task_{task}": constant for task in (1, 2, 3)}}
        for drift, constant in (("defocus", 0.39), ("photons", 0.42))  # 0.37 at its best, in the mean of the tasks
        for method, path in paths.items()
        for line in _rows(Arm(method, COMMON if method == ER else 0.0, 0), path)
    ]
    summary = summarise(rows)

    assert (summary["learnt_phase_defocus"], summary["learnt_phase_photons"]) == (0.0, 1.0)
    assert "forgetting_reduction_phase_defocus" not in summary
    assert summary["forgetting_reduction_phase"] == summary["forgetting_reduction_phase_photons"]


def _without_times(rows: list[Row]) -> list[Row]:
    return [{name: value for name, value in line.items() if name not in ("seconds", "waited_s")} for line in rows]


def _rows(arm: Arm, path: tuple[float, ...]) -> list[Row]:
    return [
        evaluation_row(
            arm, task, {f"{name}_error": [error, 0.5, 0.5] for name in ("amplitude", "phase")}, seconds=1, buffer_mib=0
        )
        for task, error in enumerate(path, 1)
    ]


def _all(parts: Iterator[Samples]) -> Samples:
    return Samples(*(np.concatenate(fields) for fields in zip(*parts, strict=True)))


def _prints(samples: Samples) -> list[bytes]:
    """Every sample's bytes, all fields together."""
    return [b"".join(field.tobytes() for field in one) for one in zip(*samples, strict=True)]
