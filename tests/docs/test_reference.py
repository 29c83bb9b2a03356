"""The pages of the reference are those that the code gives, and every key has an example that is valid."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest

from rehearsal_plugin import RehearsalConfig
from rehearsal_plugin.config import json_schema
from rehearsal_plugin.core.metrics import Metrics
from scripts.reference.config_page import keys
from scripts.reference.examples import EXAMPLES, NEEDED
from scripts.reference.page import PAGES, totals
from tests.helpers.paths import ROOT

KEYS = {key.name: key for key in keys(json_schema())}


def section_with(entries: dict[str, Any]) -> dict[str, Any]:
    """Nested sections of dotted keys."""
    section: dict[str, Any] = {}
    for name, value in entries.items():
        *path, last = name.split(".")
        inner = section
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return section


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_the_code_gives_now(name: str) -> None:
    shipped = (ROOT / "docs/reference" / name).read_text()
    code = f"from scripts.reference.page import PAGES; print(PAGES[{name!r}](), end='')"
    # In a process of its own: other tests register policies, which the page would list.
    made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shipped == made.stdout, "run: python -m scripts.reference.page"


def test_every_key_of_the_config_is_on_the_page() -> None:
    sections = RehearsalConfig().model_dump()
    names = {f"{key}.{name}" for key, value in sections.items() if isinstance(value, dict) for name in value}
    names |= {key for key, value in sections.items() if value is not None and not isinstance(value, dict)}
    page = (ROOT / "docs/reference/config.md").read_text()
    assert len(names) > 40
    assert [name for name in names if f"### `{name}`\n" not in page] == []


def test_each_key_has_one_example() -> None:
    assert set(EXAMPLES) == set(KEYS)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_valid_and_not_the_default(name: str) -> None:
    RehearsalConfig.load(section_with({name: EXAMPLES[name], **NEEDED.get(name, {})}))
    assert EXAMPLES[name] != KEYS[name].schema.get("default")


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_default_that_is_shown_is_that_of_the_code(name: str) -> None:
    page = (ROOT / "docs/reference/config.md").read_text()
    (shown,) = re.findall(rf"### `{re.escape(name)}`\n.*?^Default: (.*?) · ", page, re.DOTALL | re.MULTILINE)
    key = KEYS[name]
    default = RehearsalConfig().ratio if name == "ratio" else key.schema.get("default")
    words = "you have to give it" if key.required else "none"
    assert shown.startswith(words if default is None else f"`{json.dumps(default)}`")


def test_the_metrics_of_every_job_are_on_the_page() -> None:
    assert set(totals()) == set(Metrics().flat())
