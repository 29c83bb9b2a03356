"""`rehearsal watch` and `rehearsal report`, from the files that jobs write."""

from __future__ import annotations

import importlib
import io
import json
import re
import shutil
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from rehearsal_plugin.cli.runs.report import build_page
from rehearsal_plugin.cli.runs.run import Point, Run
from rehearsal_plugin.cli.runs.sources import read_run
from rehearsal_plugin.cli.runs.watch import render
from rehearsal_plugin.errors import DataError, MissingDependencyError
from tests.unit.cli.test_cli import call
from tests.unit.runtime.test_metrics_file import lines, train

GUARD = {"window": 5, "bound": 1.2, "action": "raise_ratio"}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a job that forgets, and whose guard raises the ratio."""
    path = tmp_path_factory.mktemp("job") / "metrics.jsonl"
    train(path, steps=60, guard=GUARD)
    return path


def shown(run: Run, width: int = 160) -> str:
    file = io.StringIO()
    Console(file=file, width=width, markup=False, emoji=False).print(render(run))
    return " ".join(file.getvalue().replace("│", " ").split())


# --- what follows from the points ------------------------------------------------------------------------------------


def points(*values: dict[str, float]) -> list[Point]:
    return [Point(10 * number, value) for number, value in enumerate(values)]


def test_the_share_is_that_of_the_steps_between_two_points() -> None:
    run = Run("", points({"rows_new": 10, "rows_seen": 0}, {"rows_new": 40, "rows_seen": 10}))
    assert run.share_met() == [(10, 0.25)]
    assert run.total_share() == 0.2


def test_totals_that_began_anew_count_from_0() -> None:
    run = Run("", points({"waited_ms": 500.0}, {"waited_ms": 520.0}, {"waited_ms": 30.0}))
    assert run.ms_per_step("waited_ms") == [(10, 2.0), (20, 3.0)]


def test_the_record_at_the_end_is_no_step() -> None:
    told = points({"augmented_ms": 20.0}, {"augmented_ms": 40.0}, {"augmented_ms": 40.0})
    assert Run("", told, ended=True).ms_per_step("augmented_ms") == [(10, 2.0)]
    assert Run("", told[:2], ended=True).ms_per_step("augmented_ms") == [(10, 2.0)]


def test_tokens_tell_the_share_where_rows_do_not() -> None:
    run = Run("", points({"tokens_new": 0, "tokens_replayed": 0}, {"tokens_new": 90, "tokens_replayed": 10}))
    assert run.share_met() == [(10, 0.1)]


def test_the_guard_is_heard(job: Path) -> None:
    texts = [event.text for event in read_run(job).events()]
    assert texts[:2] == ["the loss on replayed rows went past the guard's bound", "the ratio went from 0.25 to 0.375"]


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_file_of_metrics_is_read_whole(job: Path) -> None:
    run = read_run(job)
    records = [line for line in lines(job) if "event" not in line]
    assert [point.step for point in run.points] == [record["step"] for record in records]
    assert run.ended
    assert run.section["policy"] == "reservoir"
    assert run.partitions("loss_replayed") == [0, 1]
    assert run.last.values["age_4"] == records[-1]["age"][4]
    assert run.total_share() == pytest.approx(records[-1]["rows_seen"] / (720 + records[-1]["rows_seen"]))


def test_a_folder_stands_for_the_newest_run_in_it(job: Path, tmp_path: Path) -> None:
    shutil.copy(job, tmp_path)
    (tmp_path / "data.jsonl").write_text('{"text": "no run"}\n')
    assert read_run(tmp_path).source == str(tmp_path / "metrics.jsonl")


def test_a_line_on_its_way_is_left_out(job: Path, tmp_path: Path) -> None:
    text = job.read_text()
    (tmp_path / "metrics.jsonl").write_text(text[: len(text) // 2])
    run = read_run(tmp_path / "metrics.jsonl")
    assert not run.ended
    assert len(run.points) == text[: len(text) // 2].count("\n") - 1


def test_what_a_job_that_goes_on_does_again_is_told_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    train(path)
    train(path)
    assert [point.step for point in read_run(path).points] == [0, 5, 10, 15, 20]


def test_a_file_that_was_begun_anew_is_read_with_the_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    train(path, steps=200, every=1, rotate="20kB")
    steps = [point.step for point in read_run(path).points]
    assert steps == list(range(steps[0], 201))


def metrics_of(job: Path) -> list[tuple[int, dict[str, float]]]:
    return [(line["step"], line["metrics"]) for line in lines(job) if "event" not in line]


def test_the_log_of_a_trainer_is_read(job: Path, tmp_path: Path) -> None:
    state = pytest.importorskip("transformers").TrainerState()
    for step, metrics in metrics_of(job):
        state.log_history.append({"loss": 1.0, "step": step, **{f"rehearsal/{k}": v for k, v in metrics.items()}})
        state.log_history.append({"eval_loss": 1.0, "step": step})
    (tmp_path / "checkpoint-60").mkdir()
    state.save_to_json(str(tmp_path / "checkpoint-60" / "trainer_state.json"))
    run = read_run(tmp_path)
    assert run.series("loss_replayed/0") == read_run(job).series("loss_replayed/0")
    assert "loss, replayed" in shown(run)


def test_the_files_of_deepspeeds_monitor_are_read(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("deepspeed.monitor.csv_monitor")
    monkeypatch.setattr(module.dist, "get_rank", lambda: 0)
    monitor = module.csvMonitor(SimpleNamespace(enabled=True, output_path=str(tmp_path), job_name="job"))
    for step, metrics in metrics_of(job):
        monitor.write_events([(f"Train/Rehearsal/{name}", value, step) for name, value in metrics.items()])
    run = read_run(tmp_path)
    assert run.counts == "sample"
    assert run.partitions("rows_stored") == [0, 1]
    assert run.series("rows_stored/1") == read_run(job).series("rows_stored/1")
    assert replace(run, ended=True).ms_per_step("waited_ms") == read_run(job).ms_per_step("waited_ms")


@pytest.mark.parametrize("text", [None, "", "no JSON\n", '{"step": 1}\n', '["a"]\n', '{"event": "start"}\n'])
def test_what_is_no_run_is_refused_with_what_to_name(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=r"rehearsal\.metrics\.file"):
        read_run(path)
    with pytest.raises(DataError, match=r"rehearsal\.metrics\.file"):
        read_run(tmp_path)


# --- watch -----------------------------------------------------------------------------------------------------------


def test_watch_shows_share_losses_rows_ages_waits_and_the_guard(job: Path) -> None:
    text, values = shown(read_run(job)), read_run(job).last.values
    assert "optimizer step 60 (ended)" in text
    assert "in all, 0.5 asked for" in text
    assert "waited, ms a step" in text
    assert "ages of rows in steps, quartiles" in text
    row = f"0 360 {values['rows_stored/0']:.0f} {values['rows_replayed/0']:.0f} {values['age/0']:.0f}"
    assert row in text
    assert "guard, step 40: the ratio went from 0.375 to 0.5" in text


def test_watch_once_ends(job: Path) -> None:
    assert "optimizer step 60" in call("watch", job, "--once")
    assert "optimizer step 60" in call("watch", job)  # no terminal


def test_watch_follows_a_job_until_it_ends(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, (first, *rest) = tmp_path / "metrics.jsonl", job.read_text().splitlines(keepends=True)
    path.write_text(first + rest[0])
    output = io.StringIO()
    watching = importlib.import_module("rehearsal_plugin.cli.runs.watch")  # the package has the command of that name
    monkeypatch.setattr(watching, "Console", lambda **_: Console(file=output, force_terminal=True, width=160))

    def write_the_rest() -> None:
        for line in rest[1:]:
            time.sleep(0.02)
            with path.open("a") as file:
                file.write(line)

    writer = threading.Thread(target=write_the_rest)
    writer.start()
    watching.watch(path, every=0.05)  # returns by itself
    writer.join()
    assert "optimizer step 0" in output.getvalue()
    assert "optimizer step 60 (ended)" in output.getvalue()


def test_watch_waits_for_a_job_to_begin(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, output = tmp_path / "metrics.jsonl", io.StringIO()
    watching = importlib.import_module("rehearsal_plugin.cli.runs.watch")
    monkeypatch.setattr(watching, "Console", lambda **_: Console(file=output, force_terminal=True, width=160))
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            path.write_text(job.read_text())

    monkeypatch.setattr(watching.time, "sleep", sleep)
    watching.watch(path, every=0.05)
    assert looks == [0.05, 0.05]
    assert "optimizer step 60 (ended)" in output.getvalue()
    with pytest.raises(DataError, match="is not there yet; start the job first"):
        read_run(tmp_path / "another.jsonl")


# --- report ----------------------------------------------------------------------------------------------------------


def test_the_report_is_one_page_with_its_plots(job: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / "report.html"
    assert call("report", job, "-o", path) == f"wrote {path}\n"
    page = path.read_text()
    for title in ("Share of replayed rows", "Loss on new rows, by domain", "Loss on replayed rows, by domain"):
        assert f"<h2>{title}</h2><svg" in page
    for title in ("Stored rows, by domain", "Median age of stored rows, by domain", "Milliseconds a step"):
        assert title in page
    assert "the ratio went from 0.375 to 0.5" in page
    assert not re.search(r"""(?:src|href)=["'](?!#)""", page), "it needs no other file"
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(svg)


def test_names_of_a_job_are_no_html() -> None:
    pytest.importorskip("matplotlib")
    run = Run("<b>.jsonl", points({"rows_stored": 1}, {"rows_stored": 2}), {"policy": "<script>"})
    assert "<script>" not in build_page(run)
    assert "<b>" not in build_page(run)


def test_without_matplotlib_the_extra_is_named(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"rehearsal_plugin\[plot\]"):
        build_page(read_run(job))


def test_a_log_without_losses_has_the_plots_that_it_can_have() -> None:
    pytest.importorskip("matplotlib")
    values: list[dict[str, Any]] = [{"rows_stored": 1.0, "loss_new": float("nan")}, {"rows_stored": 2.0}]
    page = build_page(Run("run", points(*values)))
    assert page.count("<svg") == 2
    assert json.dumps("run") not in page
