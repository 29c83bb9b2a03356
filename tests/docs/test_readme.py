"""What the README shows is what runs."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest

from rehearsal_plugin import RehearsalConfig
from rehearsal_plugin.config import find_block
from tests.helpers.paths import ROOT
from tests.helpers.ranks import run_snippet

README = (ROOT / "README.md").read_text()
DOCS = "".join(path.read_text() for path in sorted((ROOT / "docs").rglob("*.md")))


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its head."""
    table = re.findall(r"^\| (.*) \|$", README.partition(f"## {heading}\n")[2].partition("\n## ")[0], re.MULTILINE)
    return [line.split(" | ") for line in table if not set(line) <= set("-| ")][1:]


def summary(name: str) -> dict[str, float]:
    figures: dict[str, float] = json.loads((ROOT / "docs/results" / f"{name}.json").read_text())["summary"]
    return figures


def mean_loss(arm: str, after: str) -> float:
    """The mean over the seeds of the loss on English of an arm of the recipe."""
    report = json.loads((ROOT / "docs/results/train_llm.json").read_text())
    chosen = [row for row in report["rows"] if (row["variant"], row["arm"], row["after"]) == ("base", arm, after)]
    assert len(chosen) == 3
    return statistics.mean(float(row["english"]) for row in chosen)


def test_it_is_short() -> None:
    assert len(README.split()) <= 700


def test_its_figures_are_those_of_the_reports() -> None:
    gpt, skill = summary("quickstart"), summary("train_skills")
    assert [[figure for cell in row for figure in re.findall(r"\d\.\d{3}", cell)] for row in rows("Results")] == [
        [f"{gpt[f'python_{state}']:.3f}" for state in ("after_phase_one", "without", "with")],
        [f"{mean_loss(arm, after):.3f}" for arm, after in (("english", "english"), ("0", "french"), ("25", "french"))],
        [f"{skill[name]:.3f}" for name in ("skill_left", "skill_kept")],
    ]


def test_it_says_in_ten_rows_what_works() -> None:
    assert len(rows("What works with what")) == 10


def test_the_first_example_replays_what_the_page_says() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/get_started.md").read_text(), re.DOTALL)
    assert "'rows_replayed': 392" in run_snippet(example)  # 98 steps of 4


@pytest.mark.parametrize("example", re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL))
def test_the_examples_of_the_docs_run_as_they_stand(example: str) -> None:
    run_snippet(example)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:scripts|configs|docs)/[\w./]+\w", README))))
def test_every_file_that_it_names_exists(path: str) -> None:
    assert (ROOT / path).is_file()


def test_every_config_that_is_shipped_is_valid() -> None:
    for path in filter(Path.is_file, (ROOT / "configs").iterdir()):
        assert find_block(path) is not None, path
        RehearsalConfig.load(path)
