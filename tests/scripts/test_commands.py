"""Commands that the documentation names are there, and its pages are those that their scripts build."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.benchmarks import page as performance_page
from scripts.clients import page as trainers_page
from scripts.llm import page as llm_page
from scripts.studies.page import HEAD, STUDIES
from tests.helpers.paths import ROOT

WRITTEN = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").rglob("*.md"),
    *(path for folder in ("scripts", "rehearsal_plugin") for path in (ROOT / folder).rglob("*.py")),
    *(ROOT / "scripts").glob("*.sh"),
]
COMMAND = re.compile(r"-m(?:odule)? (scripts(?:\.\w+)+)(?![\w.{])")
MODULES = {
    *(name for path in WRITTEN for name in COMMAND.findall(path.read_text())),
    *(f"scripts.benchmarks.{section.name}" for section in performance_page.SECTIONS),
    *(f"scripts.studies.{study.name}" for study in STUDIES),
}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_module_that_is_to_be_run_can_be_run(module: str) -> None:
    code = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text()
    assert 'if __name__ == "__main__":' in code


def test_no_script_is_run_by_its_path() -> None:
    assert not [path for path in WRITTEN if re.search(r"python3? scripts/|deepspeed [^\n]*scripts/", path.read_text())]


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_package_of_scripts_imports_only_what_is_common(path: Path) -> None:
    package = path.relative_to(ROOT / "scripts").parts[0]
    shared = {package, "common", *{"examples": ["llm"], "gpu": ["benchmarks"]}.get(package, [])}
    assert set(re.findall(r"^\s*from scripts\.(\w+)", path.read_text(), re.MULTILINE)) <= shared


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (performance_page.build, "results/performance.md"),
        (llm_page.build, "results/llm.md"),
        (trainers_page.build, "guides/trainers/index.md"),
    ],
)
def test_a_page_that_is_shipped_is_what_its_script_makes_of_the_shipped_reports(
    build: Callable[[Path], Path], name: str, tmp_path: Path
) -> None:
    shutil.copytree(ROOT / "docs/results", tmp_path / "results")
    assert build(tmp_path).read_text() == (ROOT / "docs" / name).read_text()


def test_the_words_of_the_page_of_studies_are_those_of_its_script() -> None:
    page = (ROOT / "docs/results/study.md").read_text()
    assert page.startswith(HEAD)
    for study in STUDIES:
        assert study.text in page
        assert f"`{study.command}`" in page
