"""The diffs of the README and of the guides run as they stand, with the log lines that follow them."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from rehearsal_plugin import RehearsalConfig
from tests.helpers.paths import ROOT

PAGES = ("README.md", "docs/guides/deepspeed.md", "docs/guides/horovod.md")
MOST_ADDED = 5
LOGGED = "import logging\nlogging.basicConfig(level=logging.INFO)\n"
LAUNCHERS = {
    "deepspeed": ["torchrun", "--nproc_per_node", "2"],
    "horovod": ["horovodrun", "-np", "2", "--gloo", "python"],
    "transformers": [sys.executable],
}


class Snippet(NamedTuple):
    """A script with its changes, the config of the page if it has one, and the log lines to expect."""

    page: str
    framework: str
    diff: str
    config: str
    lines: list[str]


def after(diff: str) -> str:
    """What a diff leads to."""
    return "".join(line[1:] or "\n" for line in diff.splitlines(keepends=True) if not line.startswith("-"))


def before(diff: str) -> str:
    """What a diff starts from."""
    return "".join(line[1:] or "\n" for line in diff.splitlines(keepends=True) if not line.startswith("+"))


def snippets(page: str) -> list[Snippet]:
    """The scripts of a page, in its order."""
    blocks = re.findall(r"```(\w*)\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    found = []
    for place, (language, text) in enumerate(blocks):
        if language != "diff" or "import" not in text:
            continue
        rest = blocks[place + 1 :]
        beside = [after(body) if kind == "diff" else body for kind, body in rest[:1]]
        configs = [body for body in beside if body.startswith("{")]
        logged = next(body for kind, body in rest if not kind and body.startswith("rehearsal"))
        framework = next(name for name in LAUNCHERS if re.search(rf"^.(?:import|from) {name}", text, re.MULTILINE))
        found.append(Snippet(page, framework, text, "".join(configs), logged.splitlines()))
    return found


SNIPPETS = [one for page in PAGES for one in snippets(page)]
IDS = [f"{one.page}-{one.framework}" for one in SNIPPETS]


def test_the_readme_has_the_three_of_them() -> None:
    assert [one.framework for one in snippets("README.md")] == ["deepspeed", "transformers", "horovod"]


@pytest.mark.parametrize("snippet", SNIPPETS, ids=IDS)
def test_a_diff_is_small_and_starts_from_a_whole_script(snippet: Snippet) -> None:
    ast.parse(before(snippet.diff))
    assert "rehearsal" not in before(snippet.diff)
    added = snippet.diff.count("\n+") + snippet.diff.startswith("+") + snippet.config.count('"rehearsal"')
    assert added <= MOST_ADDED
    if snippet.config:
        RehearsalConfig.load(json.loads(snippet.config))


@pytest.mark.timeout(900)  # DeepSpeed compiles a file at its first start
@pytest.mark.parametrize("snippet", SNIPPETS, ids=IDS)
def test_a_script_runs_with_the_log_lines_that_are_shown(snippet: Snippet, tmp_path: Path) -> None:
    pytest.importorskip(snippet.framework)
    shutil.copy(ROOT / "tests/helpers/jobs/task.py", tmp_path)
    (tmp_path / "train.py").write_text(LOGGED + after(snippet.diff))
    for name in ("ds_config.json", "rehearsal.json"):
        (tmp_path / name).write_text(snippet.config)
    command = [*LAUNCHERS[snippet.framework], "train.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=850, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for line in snippet.lines:
        assert line.removesuffix(" ...") in done.stdout + done.stderr
