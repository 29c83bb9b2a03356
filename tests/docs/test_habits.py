"""Files about the project agree with it: versions, commands of the workflows, links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import rehearsal_plugin
from tests.helpers.paths import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PAGES = ["CITATION.cff", "CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "RELEASING.md", "SECURITY.md", "CHANGELOG.md"]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def steps(workflow: Path) -> list[str]:
    jobs = yaml.safe_load(workflow.read_text())["jobs"].values()
    return [step["run"] for job in jobs for step in job["steps"] if "run" in step]


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert project is not None
    assert citation["version"] == project[1] == rehearsal_plugin.__version__
    assert f"## {project[1]}" in (ROOT / "CHANGELOG.md").read_text()
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_scripts_that_are_there(workflow: Path) -> None:
    assert steps(workflow)
    for script in re.findall(r"scripts/\w+\.sh", "\n".join(steps(workflow))):
        assert (ROOT / script).is_file()


def test_the_scripts_of_tests_are_all_called_by_a_workflow() -> None:
    called = "\n".join(step for workflow in WORKFLOWS for step in steps(workflow))
    missing = [path.name for path in (ROOT / "scripts").glob("test*.sh") if path.name not in called]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_a_page_links_and_names_files_that_are_there(page: str) -> None:
    text = (ROOT / page).read_text()
    named = re.findall(r"(?:scripts|docs|tests|configs)/[\w./-]+\.(?:sh|py|md|json)", text)
    links = [link for link in re.findall(r"\]\(([\w./-]+)", text) if not link.startswith("http")]
    for path in {*named, *links}:
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_a_form_for_issues_can_be_read(form: Path) -> None:
    content = yaml.safe_load(form.read_text())
    assert form.stem == "config" or {"name", "description", "body"} <= content.keys()
