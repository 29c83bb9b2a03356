"""The map of the code names files, layers and modules that are there."""

from __future__ import annotations

import re

import pytest

from tests.helpers.paths import ROOT

PACKAGE = ROOT / "rehearsal_plugin"
PAGE = (ROOT / "docs" / "contribute" / "architecture.md").read_text()
PICTURE = (ROOT / "docs" / "images" / "architecture.svg").read_text()
LAYERS = re.search(r"^layers = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`([\w/]+(?:\.py|/))`", PAGE))))
def test_every_path_of_the_page_exists(path: str) -> None:
    assert (PACKAGE / path).exists()


def test_the_picture_has_every_layer_in_its_order() -> None:
    assert LAYERS is not None
    names = [name for layer in re.findall(r'"(.*?)"', LAYERS[1]) for name in layer.split(" | ")]
    drawn = re.findall(r'font-weight="bold" fill="#1e293b">(.*?)<', PICTURE)
    assert [name for layer in drawn for name in layer.split(" · ")] == names


def test_every_box_of_the_picture_is_a_file_or_a_folder() -> None:
    boxes = [box for label in re.findall(r'font-size="13".*?>(.*?)<', PICTURE) for box in label.split()]
    names = {path.stem for path in PACKAGE.rglob("*.py")} | {path.name for path in PACKAGE.rglob("*") if path.is_dir()}
    assert len(boxes) > 20
    assert {box.rstrip("/") for box in boxes} <= names


def test_the_page_fits_on_two_screens() -> None:
    assert len(PAGE.splitlines()) <= 80


def test_the_glossary_explains_the_terms_of_the_code() -> None:
    words = re.findall(r"^\| (\w+) \| .* \|$", PAGE.partition("## Words")[2], re.MULTILINE)
    assert {"row", "slot", "partition", "draw", "share", "representative", "candidate", "peer"} <= set(words)
    assert {"header", "mixture", "exchange", "plan", "policy", "transport", "state"} <= set(words)
