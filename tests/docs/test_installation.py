"""The page on installation lists the extras and versions that there are."""

from __future__ import annotations

import re

import pytest

from tests.helpers.paths import ROOT

PAGE = (ROOT / "docs" / "installation.md").read_text()
PROJECT = (ROOT / "pyproject.toml").read_text()
SETS = ("oldest", "middle", "newest")
COLUMNS = ("torch", "numpy", "pydantic", "deepspeed", "transformers", "accelerate")


def pins(name: str) -> dict[str, str]:
    text = (ROOT / "configs" / "versions" / f"{name}.txt").read_text()
    return dict(re.findall(r"^([\w.-]+)==([\w.]+)$", text, re.MULTILINE))


def test_every_extra_of_a_user_is_on_the_page() -> None:
    extras = re.findall(r"^(\w+) = \[$", PROJECT.partition("[project.optional-dependencies]")[2], re.MULTILINE)
    listed = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert set(listed) == set(extras[: extras.index("dev")])


@pytest.mark.parametrize("name", SETS)
def test_the_table_of_versions_is_that_of_the_pins(name: str) -> None:
    row = re.search(rf"^\| {name} \| 3[^\n]*$", PAGE, re.MULTILINE)
    assert row is not None
    cells = [cell.strip() for cell in row[0].strip("|").split("|")][2:]
    assert cells == [pins(name)[column] for column in COLUMNS]


def test_the_oldest_set_has_the_lower_bounds() -> None:
    bounds = dict(re.findall(r'^\s*"([\w-]+)>=([\d.]+)', PROJECT.partition("dev = [")[0], re.MULTILINE))
    bounds = {name.lower(): bound for name, bound in bounds.items()}
    oldest = {name.lower(): version for name, version in pins("oldest").items()}
    for name in oldest.keys() & bounds.keys():
        assert (oldest[name] + ".").startswith(bounds[name] + "."), name
