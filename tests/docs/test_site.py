"""The site builds without a warning: every page is in the navigation, every link and anchor leads somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import rehearsal_plugin
from tests.helpers.paths import ROOT

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings")


class Page(HTMLParser):
    """The targets of links and pictures of a page, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.targets += [target for name in ("href", "src") if (target := given.get(name))]
        self.anchors |= {given["id"]} if given.get("id") else set()  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_built(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT / "docs").with_suffix(".html")).is_file(), page


def test_every_link_and_picture_of_the_site_leads_somewhere(site: Path) -> None:
    pages = {path: Page(path.read_text()) for path in site.rglob("*.html")}
    lost = []
    for path, page in pages.items():
        for target in page.targets if path.name != "404.html" else ():
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            there = there / "index.html" if there.is_dir() else there
            known = pages.get(there)
            if not there.exists() or (parts.fragment and known and unquote(parts.fragment) not in known.anchors):
                lost.append((path.name, target))
    assert len(pages) > 30
    assert lost == []


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    text = (site / "index.html").read_text()
    assert re.findall(r"<(?:script|link)[^>]+(?:src|href)=\"https?://[^\"]+\"", text) == []


def test_the_api_has_what_users_import(site: Path) -> None:
    anchors = Page((site / "reference/api.html").read_text()).anchors
    missing = [name for name in rehearsal_plugin.__all__ if not any(anchor.endswith(f".{name}") for anchor in anchors)]
    assert missing == []


def test_the_checks_of_the_project_build_the_site() -> None:
    assert "bash scripts/docs.sh" in (ROOT / "scripts/test.sh").read_text()
    assert "mkdocs build --strict" in (ROOT / "scripts/docs.sh").read_text()
