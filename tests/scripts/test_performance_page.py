"""The page of performance is built from reports alone, and its commands are there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from scripts.benchmarks import page as performance_page
from scripts.benchmarks import scale as bench_scale
from scripts.benchmarks.page_cluster import PICTURE, hidden
from tests.helpers.paths import ROOT

PLACE = {"ranks": 2, "cores": 2, "versions": {"torch": "2.13"}, "commit": "0" * 40}
COUNTS = {"collectives": 2.0, "messages": 1.0, "segments": 9.0, "row_bytes": 4000.0, "wire_bytes": 4400.0}
EXCHANGE = [
    {"rows": "small", "ranks": 2, "bytes_a_row": 1000, **COUNTS, "bytes_ratio": 1.1},
    {"rows": "threads", "ranks": 64, "scope": "16", "messages_max": 17.5},
    {
        "rows": "draw",
        "ranks": 1024,
        "partitions": 10,
        "ms": 0.9,
        "ms_low": 0.8,
        "ms_high": 1.2,
        "cpu_ms": 0.7,
        "rounds": 11,
    },
]
SCALE = [
    {"kind": "fit", "base_us": 100.0, "hop_us": 20.0, "gb_s": 0.5, "cores": 2},
    {
        "kind": "validation", "ranks": 16, "bytes_a_row": 1024, "measured_ms": 10.0, "foretold_ms": 12.0, "ratio": 1.2,
        "held_out": True,
    },
    *bench_scale.model_rows(),
    *(
        {"kind": "threads", "scope": scope, "rows_stored": 320, "rows_replayed": 20480, "ranks": 128, "z": z,
         "rank_off_by": 0.1}
        for scope, z in (("global", 0.5), ("16", -0.25))
    ),
]  # fmt: skip

BUFFER = [
    {"rows": "tokens, 16 KB", "store": "rehearsal_plugin", "what": "W14", "ms": 0.25},
    *(
        {"rows": "tokens, 16 KB", "store": "rehearsal_plugin", "what": f"{what}, a single call", "ms": 0.5}
        for what in ("W14", "G7", "G64")
    ),
    {"rows": "tokens, 16 KB", "store": "fifo", "what": "admission", "ms": 0.012},
]
OVERHEAD = [
    {
        "step_bytes": 8 << 20, "light": True, "free_core": False, "engine": "thread", "step_ms": 200.6, "rounds": 25,
        "operations": 2000.0, "raw_ratio": 1.07, "unit_ratio": 0.99,
        "ratio": 1.02, "ratio_low": 1.01, "ratio_high": 1.03,
        "cpu_ratio": 1.05, "cpu_ratio_low": 1.04, "cpu_ratio_high": 1.06,
        "paid_ms": 0.5, "augmented_ms": 1.0, "waited_ms": 2.0, "written_ms": 3.0, "drawn_ms": 4.0, "exchanged_ms": 5.0,
    },
]  # fmt: skip


FILE = [
    {
        "reads": "ahead", "file_mb": 4000, "cache_mb": 400, "row_bytes": 65536, "drawn": 12, "faults": 0.0,
        "ms": 2.0, "ms_low": 1.0, "ms_high": 3.0,
    },
]  # fmt: skip


RAGGED = [
    {"operation": "W14", "different_us": 90.0, "one_us": 30.0, "ratio": 3.0, "low": 2.5, "high": 3.5},
]  # fmt: skip


def keep(docs: Path, name: str, summary: dict[str, float], rows: list[dict[str, Any]]) -> None:
    folder = docs / "results"
    folder.mkdir(exist_ok=True)
    report = {"summary": summary, "rows": rows, "environment": PLACE}
    (folder / f"bench_{name}.json").write_text(json.dumps(report))


def test_every_section_is_built_from_its_report(tmp_path: Path) -> None:
    keep(tmp_path, "exchange", {"bytes_ratio_max": 1.1, "draw_ms_1024": 0.7, "load": 3.0}, EXCHANGE)
    keep(tmp_path, "scale", {"load": 2.0}, SCALE)
    keep(tmp_path, "buffer", {"vs_copy_min": 0.5}, BUFFER)
    keep(tmp_path, "overhead", {"ratio_busy": 1.02}, OVERHEAD)
    keep(tmp_path, "file", {"major_faults": 0.0}, FILE)
    keep(
        tmp_path,
        "ragged",
        {"held_vs_stored": 1.08, "padded_vs_stored": 13.0, "moved_vs_written": 5.0, "w14_vs_one": 3.0},
        RAGGED,
    )
    performance_page.main(["--docs", str(tmp_path)])
    page = (tmp_path / "results/performance.md").read_text()

    assert "| small | 1,000 | 2 | 2.0 | 1.0 | 9.0 | 4,000 | 4,400 | 1.100 |" in page
    assert "≤ 1.02 | 1.100 | short by 0.080 |" in page
    assert "≤ 1 | 0.700 | met |" in page
    assert "| 1,024 | 10 | 0.7 | 0.9 (0.8 to 1.2) | 11 |" in page
    assert "| 16 (foretold) | 1,024 | 10 | 12 | 1.2 |" in page
    assert "| groups of 16 | 320 | 20,480 | 10.0% | -0.25 |" in page
    assert "| 64 | groups of 16 | 17.50 |" in page
    assert "| rehearsal_plugin | 250.0 |" in page
    assert "| rehearsal_plugin | 500.0 | 500.0 | 500.0 |" in page
    assert "| fifo | 12.0 |" in page
    assert "| 8 (light) | no | thread | 2 | 201 | 25 | 1.020 (1.010 to 1.030) | 0.004 | 1.070 | 0.990 | 1.050 (" in page
    assert "| 8 (light) | no | thread | 0.50 | 1.00 | 2.00 | 3.00 | 4.00 | 5.00 |" in page
    assert "12 rows of 64 KiB of a file of 4,000 MiB, with 400 MiB of page cache:" in page
    assert "| ahead | 2.00 (1.00 to 3.00) | 0.0 |" in page
    assert "Held are 1.080 bytes for each byte stored; padded rows would take 13.0." in page
    assert "| W14 | 90.0 | 30.0 | 3.00 (2.50 to 3.50) |" in page
    assert "2 ranks on 2 cores, load 3, torch 2.13, commit 000000000000." in page
    assert (tmp_path / PICTURE).read_bytes().startswith(b"\x89PNG")


def test_sections_without_a_report_are_left_out(tmp_path: Path) -> None:
    page = performance_page.build(tmp_path).read_text()
    assert re.findall(r"^## (.*)$", page, re.MULTILINE) == ["`rehearsal plan`"]
    for command in performance_page.PLANS:
        assert f"$ {command}\n" in page
    assert page.count("┌") == len(performance_page.PLANS), "each with its table"


def test_the_largest_cluster_that_a_step_hides_is_the_last_below_it() -> None:
    rows = [{"load": "a", "links": "h100-ndr", "gpus": gpus, "total": gpus / 2} for gpus in (8, 16, 32)]
    assert [line[1] for line in hidden(rows, "a")] == ["16 GPUs", "32 GPUs", "32 GPUs"]


def test_the_page_that_is_shipped_names_files_that_exist() -> None:
    page = (ROOT / "docs/results/performance.md").read_text()
    named = set(re.findall(r"(?:scripts|configs|docs/results)/[\w./]+\w", page))
    assert named
    assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("name", ["buffer", "exchange", "file", "overhead", "ragged", "scale"])
def test_the_results_that_are_shipped_are_those_on_the_page(name: str) -> None:
    report = json.loads((ROOT / f"docs/results/bench_{name}.json").read_text())
    assert report["environment"]["commit"][:12] in (ROOT / "docs/results/performance.md").read_text()
