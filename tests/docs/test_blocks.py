"""Every code block of the README and of the docs is tried: run, or parsed by what would run it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import typer.main
from typer.testing import CliRunner

from rehearsal_plugin import RehearsalConfig, cli, run
from tests.helpers.paths import ROOT

PATHS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
GENERATED = {"reference/cli.md", "results/performance.md"}
"""Pages whose blocks are the output of the commands themselves."""

TESTED_ELSEWHERE = {
    "py": {"guides/trainers/lightning.md", "guides/trainers/hf_trainer.md"},  # parts of modules, by their own tests
    "diff": {"README.md", "guides/deepspeed.md", "guides/horovod.md"},  # test_snippets.py
}
LOG_LINES = (
    r"rehearsal: a row is (\w+ \w+ \[\d*\](, )?)+; \d+ bytes a row( at most)?, "
    r"\d+ rows fit into the buffer of a rank(; \.\.\.)?",
    r"rehearsal on rank \d+: \d+ rows offered, \d+ stored, \d+ replayed; the share of replayed rows was 0\.\d{4}",
    r"\{'loss': '[\d.]+', \.\.\., 'rehearsal/rows_stored': '\d+', 'rehearsal/rows_replayed': '\d+', \.\.\.\}",
)
EXTRAS = re.findall(r"^(\w+) = \[$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
PINS = (ROOT / "constraints.txt").read_text()
COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


class Block(NamedTuple):
    """A code block: its page, its language, what is in it."""

    page: str
    language: str
    text: str


def blocks_of(path: Path) -> list[Block]:
    page = str(path.relative_to(ROOT / "docs" if ROOT / "docs" in path.parents else ROOT))
    found = re.findall(r"^ *```(\w*)\n(.*?)^ *```", path.read_text(), re.DOTALL | re.MULTILINE)
    return [] if page in GENERATED else [Block(page, language, text) for language, text in found]


BLOCKS = [block for path in PATHS for block in blocks_of(path)]
LOGGED = [block for block in BLOCKS if block.language == "" and re.match(r"rehearsal( on|:)|\{", block.text)]
SHELL = [block for block in BLOCKS if block.language in ("", "bash") and block not in LOGGED]


def lines_of(block: Block) -> list[list[str]]:
    """The words of each command of a block."""
    joined = block.text.replace("\\\n", " ")
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


SIMPLE = [block for block in SHELL if not re.search("<<END|srun", block.text)]
CALLS = [words for block in SIMPLE for words in lines_of(block)]


def test_every_block_is_of_a_kind_that_is_tried() -> None:
    assert len(BLOCKS) > 80
    known = {"python", "json", "", "bash", *TESTED_ELSEWHERE}
    assert {block.language for block in BLOCKS} <= known
    for language, pages in TESTED_ELSEWHERE.items():
        assert {block.page for block in BLOCKS if block.language == language} == pages


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "json"], ids=lambda block: block.page)
def test_a_section_is_valid(block: Block) -> None:
    RehearsalConfig.load(json.loads(block.text))


@pytest.mark.parametrize("block", LOGGED, ids=lambda block: block.page)
def test_a_log_line_has_the_form_that_the_package_gives_it(block: Block) -> None:
    for line in block.text.strip().splitlines():
        assert any(re.fullmatch(form, line) for form in LOG_LINES), line


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.page)
def test_a_shell_block_can_be_parsed(block: Block) -> None:
    text = re.sub(r"<(your command)>", r"\1", block.text)
    subprocess.run(["bash", "-n", "-c", text], check=True, timeout=20)


@pytest.mark.parametrize("words", [words for words in CALLS if words[0] == "rehearsal"], ids=" ".join)
def test_a_command_of_rehearsal_has_these_options(words: list[str]) -> None:
    if words[1] == "plan":
        result = CliRunner().invoke(cli.app, [word.replace("configs/", f"{ROOT}/configs/") for word in words[1:]])
        assert result.exit_code == 0, result.output
        return
    command = COMMANDS[words[1]]
    command.make_parser(command.context_class(command)).parse_args(words[2:])


@pytest.mark.parametrize("words", [words for words in CALLS if "rehearsal_plugin.run" in words], ids=" ".join)
def test_a_start_through_the_plugin_has_these_options(words: list[str]) -> None:
    options = run._parser().parse_args(words[words.index("rehearsal_plugin.run") + 1 :])
    assert options.script or options.module


@pytest.mark.parametrize("words", [words for words in CALLS if words[0] == "bash"], ids=" ".join)
def test_a_script_that_is_started_is_there(words: list[str]) -> None:
    assert (ROOT / words[1]).is_file()


@pytest.mark.parametrize("words", [words for words in CALLS if words[0] == "pip"], ids=" ".join)
def test_what_is_installed_is_an_extra_or_pinned(words: list[str]) -> None:
    for word in words[2:]:
        if extra := re.fullmatch(r"\.\[(\w+)\]", word):
            assert extra[1] in EXTRAS
        elif not word.startswith("-"):
            assert f"\n{word}\n" in PINS
