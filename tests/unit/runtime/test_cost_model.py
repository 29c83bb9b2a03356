"""`rehearsal plan` and the model behind it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from rehearsal_plugin import RehearsalConfig, cli
from rehearsal_plugin.distributed.draw import draw
from rehearsal_plugin.errors import ConfigError
from rehearsal_plugin.runtime.cost_model import LINKS, Links, Load, busiest_rows, coverage, load_of, times
from tests.helpers.paths import ROOT

PLAIN = Links(node=4, base_us=1000, hop_us=10_000, net_hop_us=100_000, message_us=1_000_000, gb_s=1, net_gb_s=0.5)
LOAD = Load(offered=0, replayed=1, row_bytes=1_000_000, header_bytes=80, collectives=2)


def call(*arguments: Any, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, ["plan", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output


def planned(*arguments: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(call(*arguments, "--json"))
    return found


def written(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


# --- the command -----------------------------------------------------------------------------------------------------


def test_a_deepspeed_config_tells_the_micro_batch_and_the_accumulation(tmp_path: Path) -> None:
    section = {"buffer": {"capacity": "1MiB"}, "ratio": 0.5, "candidates": 2}
    config = {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 4, "rehearsal": section}
    found = planned(written(tmp_path, config), "--ranks", 16, "--row-bytes", "1KiB", "--step-ms", 100)
    assert found["replayed_rows"] == 32  # as many as new ones, in each of four micro-batches
    assert found["offered_rows"] == 8
    assert (found["buffer_rows"], found["buffer_bytes"]) == (1024, 1 << 20)
    assert found["rows_bytes"] == 32 * 1024 * 15 / 16
    assert found["headers_bytes"] == 16 * 80
    assert found["collectives"] == 2
    assert found["hides"] is True


def test_the_whole_batch_of_deepspeed_is_shared_out(tmp_path: Path) -> None:
    path = written(tmp_path, {"train_batch_size": 64, "rehearsal": {"representatives": 3}})
    found = planned(path, "--ranks", 4, "--row-bytes", 64, "--step-ms", 1)
    assert (found["offered_rows"], found["replayed_rows"]) == (16, 3)
    assert "make 48" in call(path, "--ranks", 3, "--batch", 16, "--row-bytes", 64, "--step-ms", 1, code=2)


def test_a_bare_section_takes_the_micro_batch_as_an_option(tmp_path: Path) -> None:
    path = written(tmp_path, {"ratio": 0.25, "mode": "replace"})
    found = planned(path, "--ranks", 2, "--row-bytes", 64, "--step-ms", 1, "--batch", 8, "--accumulation", 2)
    assert (found["offered_rows"], found["replayed_rows"]) == (16, 4)


def test_what_the_model_leaves_out_is_said(tmp_path: Path) -> None:
    section = {"ratio": 0.25, "retrieval": {"embedding": "vector"}, "sampling": {"weights": "retrieved"}}
    path = written(tmp_path, section)
    options = ["--ranks", "2", "--row-bytes", "64", "--step-ms", "1", "--batch", "8"]
    assert "queries and answers" in planned(path, *options)["left_out"]
    assert "Left out: the queries and answers" in call(path, *options, code=0)


def test_the_past_that_the_buffers_cover_is_told_in_rows_or_tokens(tmp_path: Path) -> None:
    path = written(tmp_path, {"buffer": {"capacity": 100}})
    common = (path, "--ranks", 5, "--row-bytes", 64, "--step-ms", 1, "--batch", 8)
    assert planned(*common, "--rows", 2000)["past_share"] == 0.25
    assert planned(*common, "--tokens", 20_000, "--row-tokens", 10)["past_share"] == 0.25
    assert planned(*common, "--rows", 300)["past_share"] == 1
    assert "past_share" not in planned(*common)
    assert "25.00% of 2,000 rows" in call(*common, "--rows", 2000)


def test_what_does_not_hide_is_said_so(tmp_path: Path) -> None:
    path = written(tmp_path, {"representatives": 8})
    slow = (path, "--ranks", 1024, "--row-bytes", "16KiB", "--step-ms", 20, "--batch", 8, "--links", "tcp")
    assert planned(*slow)["hides"] is False
    assert "NOT hidden" in call(*slow)
    faster = planned(*slow, "--hop-us", 1, "--net-hop-us", 1, "--message-us", 1, "--net-gb-s", 50)
    assert faster["hides"] is True


@pytest.mark.parametrize("strategy", ["er", "x-der"])
def test_ranks_that_draw_from_themselves_send_nothing(strategy: str, tmp_path: Path) -> None:
    path = written(tmp_path, {"sampling": {"scope": "local"}, "strategy": {"name": strategy}})
    found = planned(path, "--ranks", 64, "--row-bytes", 64, "--step-ms", 1, "--batch", 8)
    assert (found["rows_bytes"], found["headers_bytes"], found["collectives"]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--row-bytes", "many", "--step-ms", 1, "--batch", 1], "--row-bytes is 'many'"),
        (["--row-bytes", "0", "--step-ms", 1, "--batch", 1], "--row-bytes is '0'"),
        (["--row-bytes", 8, "--step-ms", 0, "--batch", 1], "--step-ms is 0"),
        (["--row-bytes", 8, "--step-ms", "nan", "--batch", 1], "--step-ms is nan"),
        (["--row-bytes", 8, "--step-ms", 1], "by --batch"),
        (["--row-bytes", 8, "--step-ms", 1, "--batch", 1, "--links", "smoke"], "h100-ndr, a100-hdr, tcp"),
        (["--row-bytes", 8, "--step-ms", 1, "--batch", 1, "--tokens", 8], "go together"),
        (["--row-bytes", 8, "--step-ms", 1, "--batch", 1, "--net-gb-s", 0], "--net-gb-s is 0"),
        (["--row-bytes", 8, "--step-ms", 1, "--batch", 1, "--rows", 8, "--tokens", 8, "--row-tokens", 8], "keep one"),
    ],
)
def test_wrong_options_are_explained(options: list[Any], message: str, tmp_path: Path) -> None:
    told = call(written(tmp_path, {}), "--ranks", 2, *options, code=2)
    assert message in " ".join(told.replace("│", " ").split())


def test_configs_that_cannot_be_planned_are_refused(tmp_path: Path) -> None:
    options = ["--ranks", "2", "--row-bytes", "100", "--step-ms", "1", "--batch", "1"]
    for config, message in (
        ({"enabled": False}, "rehearsal.enabled is false"),
        ({"buffer": {"capacity": "64B"}}, "cannot hold one row of 100 bytes"),
        ({"optimizer": {}}, "has no 'rehearsal' section"),
    ):
        path = written(tmp_path, config)
        result = CliRunner().invoke(cli.app, ["plan", str(path), *options])
        assert isinstance(result.exception, ConfigError)
        assert message in str(result.exception)


@pytest.mark.parametrize("path", ["configs/llm_en_fr_de.json", "configs/quickstart.json"])
def test_the_configs_that_are_shipped_can_be_planned(path: str) -> None:
    found = planned(ROOT / path, "--ranks", 1024, "--row-bytes", "16KiB", "--step-ms", 400, "--rows", 10**8)
    assert 0 < found["past_share"] < 1
    assert found["background_ms"]["total"] > 0


# --- the model -------------------------------------------------------------------------------------------------------


def test_headers_go_round_a_ring_and_rows_straight_to_their_reader() -> None:
    found = times(LOAD, 8, PLAIN, draw_ns=125_000, copy_gb_s=1)
    most = busiest_rows(8, 1)
    assert found.headers == pytest.approx(1 + 6 * 10 + 100 + 8 * 80 / 0.5e6)
    assert found.draw == pytest.approx(1.0)
    assert found.copies == pytest.approx(2.0)
    assert found.rows == pytest.approx(1 + 7 * 1000 + most * 7 / 8 * 1e6 / 0.5e6)
    assert found.total == pytest.approx(found.headers + found.draw + found.copies + found.rows)


def test_within_a_node_only_its_own_links_count() -> None:
    found = times(LOAD, 4, replace(PLAIN, net_hop_us=1e9, net_gb_s=1e-9), draw_ns=0, copy_gb_s=1)
    assert found.headers == pytest.approx(1 + 3 * 10 + 4 * 80 / 1e6)


def test_every_rank_gets_a_message_and_crowded_cores_take_turns() -> None:
    links = replace(PLAIN, node=16)
    alone = times(LOAD, 16, replace(links, cores=16), draw_ns=0, copy_gb_s=1)
    assert alone == times(LOAD, 16, links, draw_ns=0, copy_gb_s=1)
    crowded = times(LOAD, 16, replace(links, cores=2), draw_ns=0, copy_gb_s=1)
    assert crowded.headers == pytest.approx(8 * alone.headers)
    assert 15_000 < alone.rows < 15_100
    assert 8 * 15_000 < crowded.rows < 8 * 15_100


def test_one_rank_and_local_draws_need_no_links() -> None:
    for load, ranks in ((LOAD, 1), (replace(LOAD, collectives=0), 512)):
        found = times(load, ranks, PLAIN, draw_ns=1e6, copy_gb_s=1)
        assert (found.headers, found.draw, found.rows) == (0, 1, 0)


@pytest.mark.parametrize(("ranks", "rows"), [(2, 1), (16, 8), (1024, 8), (16_384, 1)])
def test_the_busiest_rank_of_the_model_is_that_of_the_draw(ranks: int, rows: int) -> None:
    rng = np.random.default_rng(1)
    seen = []
    for _ in range(20):
        draws = draw(np.full((ranks, 1), 1000), np.full(ranks, rows), rng)
        seen.append(int(np.bincount(draws.owner, minlength=ranks).max()))
    assert min(seen) - 1 <= busiest_rows(ranks, rows) <= max(seen) + 1


def test_no_rank_sends_more_than_all_rows() -> None:
    assert busiest_rows(16, 0) == 0
    assert busiest_rows(1, 7.5) == 8
    assert busiest_rows(2, 0.5) == 1


def test_the_load_follows_the_schedule_and_the_strategy() -> None:
    def load(**keys: Any) -> Load:
        return load_of(RehearsalConfig.load(keys), 64, batch=10, accumulation=3)

    assert load(ratio=0.5).replayed == 30
    assert load(ratio=0.5, mode="replace").replayed == 15
    assert load(ratio=0.05, ratio_schedule={"to": 0.5, "steps": 100}).replayed == 30
    assert load(ratio=0.5, ratio_schedule={"to": 0.05, "steps": 100}).replayed == 30
    assert load(representatives=4).replayed == 12
    assert load(representatives=4, strategy={"name": "der++"}).replayed == 24
    assert load(strategy={"name": "x-der"}, buffer={"partition_by": "label"}).collectives == 3
    assert load(buffer={"partition_by": "label"}, sampling={"weights": "balanced"}).header_bytes == 8 * (8 + 16)
    assert load(candidates=4).offered == 12


def test_coverage_is_what_was_offered_until_the_buffers_are_full() -> None:
    assert coverage(10, 4, 400, 1.0) == 0.1
    assert coverage(10, 4, 20, 1.0) == 1.0
    assert coverage(10, 4, 20, 0.5) == 0.5


def test_every_named_figure_has_a_source() -> None:
    assert all(links.source for links in LINKS.values())
