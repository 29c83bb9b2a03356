"""Figures that a guide repeats are those of the reports and of the pages that are built from them."""

from __future__ import annotations

import json
import re

import pytest

from tests.helpers.paths import ROOT


def summary(name: str) -> dict[str, float]:
    """The summary of a report that is kept with the docs."""
    figures: dict[str, float] = json.loads((ROOT / "docs/results" / f"{name}.json").read_text())["summary"]
    return figures


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


@pytest.mark.parametrize("percent", [5, 25, 50])
def test_what_a_ratio_buys_is_what_the_recipe_measured(percent: int) -> None:
    llm = summary("train_llm")
    gap, cost = llm[f"gap_closed_{percent}"], llm[f"cost_on_new_{percent}"]
    assert f"| {percent / 100:g} | {gap:.0%} | {cost:+.1%} |".replace("%", " %") in page("guides/choosing.md")


def test_what_a_ratio_that_rises_keeps_is_what_the_recipe_measured() -> None:
    llm = summary("train_llm")
    gap, cost = llm["gap_closed_5_rising"], llm["cost_on_new_5_rising"]
    assert f"That closes {gap:.0%} with as many rows, at no cost".replace("%", " %") in page("guides/choosing.md")
    assert cost < 0.001
    assert "A higher fixed ratio still keeps more." in page("guides/choosing.md")
    assert llm["gap_closed_25"] > gap
    assert "So far nothing beats a higher fixed ratio." in page("results/llm.md")


def test_the_accuracies_by_buffer_are_those_of_the_study() -> None:
    found = re.findall(r"^\| (er|der\+\+) \| (2\.5|30) % \| ([\d.]+) ±.*", page("results/study.md"), re.MULTILINE)
    images = {(method, size): float(value) for method, size, value in found[:4]}
    assert len(images) == 4
    text = " ".join(page("guides/choosing.md").split())
    small, large = ([f"{images[method, size]:.3f}" for method in ("der++", "er")] for size in ("2.5", "30"))
    assert f"gave an accuracy of {small[0]} with `der++` and {small[1]} with `er`." in text
    assert f"With 30 % it was {large[0]} and {large[1]}." in text
    assert images["er", "2.5"] > 0.98 * images["er", "30"]  # "kept nearly as much"


def test_the_accuracies_under_horovod_are_those_of_the_report() -> None:
    images = summary("horovod_images")
    assert f"| without rehearsal | {images['accuracy_naive']:.3f} |" in page("guides/horovod.md")
    assert f"| with rehearsal | {images['accuracy_rehearsal']:.3f} |" in page("guides/horovod.md")


def test_half_of_the_rows_keep_most_where_classes_do_not_return() -> None:
    draws = re.findall(r"^\| er \| 10 % \| (8|16|32) \| all \| ([\d.]+) \|", page("results/study.md"), re.MULTILINE)
    kept = [float(value) for _, value in draws]
    assert [rows for rows, _ in draws] == ["8", "16", "32"]
    assert kept == sorted(kept)


def test_the_first_table_of_the_results_is_that_of_the_quickstart() -> None:
    figures, text = summary("quickstart"), page("results/index.md")
    rows = {"after Python": "after_phase_one", "after C++, without rehearsal": "without"}
    for title, state in {**rows, "after C++, with rehearsal": "with"}.items():
        assert f"| {title} | {figures[f'python_{state}']:.3f} | {figures[f'cpp_{state}']:.3f} |" in text
    assert f"So {100 * figures['forgetting_removed']:.1f} % of the forgetting is gone" in text
    assert figures["cost_on_new"] < 0.001
    assert json.loads((ROOT / "configs/quickstart.json").read_text())["rehearsal"]["ratio"] == 1 / 8
