"""`rehearsal plan` and the model behind it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rehearsal_plugin import RehearsalConfig, cli
from rehearsal_plugin.distributed.header import FIXED, PARTITION_WORDS, WORD_BYTES
from rehearsal_plugin.distributed.header_schedule import LONGEST
from rehearsal_plugin.errors import ConfigError
from rehearsal_plugin.runtime.cost_model import (
    LINKS,
    Links,
    Load,
    Times,
    coverage,
    has_seldom_news,
    header_ms,
    load_of,
    times,
)
from tests.helpers.paths import ROOT

PLAIN = Links(node=4, base_us=1000, hop_us=10_000, net_hop_us=100_000, message_us=1_000_000, gb_s=1, net_gb_s=0.5)
LOAD = Load(offered=0, replayed=1, row_bytes=1_000_000, header_bytes=80, row_trips=1, header_every=1)


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
    assert found["headers_bytes"] == 16 * WORD_BYTES * (FIXED + 2)
    assert (found["header_every"], found["messages"]) == (LONGEST, 15)
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


def test_what_does_not_hide_is_said_with_the_scope_that_does(tmp_path: Path) -> None:
    balanced = {"sampling": {"weights": "balanced"}, "buffer": {"partition_by": "y"}}
    path = written(tmp_path, {"representatives": 8, **balanced})
    slow = (path, "--ranks", 1024, "--row-bytes", "16KiB", "--step-ms", 20, "--batch", 8, "--links", "tcp")
    found = planned(*slow)
    assert (found["hides"], found["scope"]) == (False, 256)
    assert "NOT hidden" in call(*slow)
    assert "Set rehearsal.sampling.scope to 256" in call(*slow)
    smaller = written(tmp_path, {"representatives": 8, **balanced, "sampling": {"weights": "balanced", "scope": 256}})
    found = planned(smaller, *slow[1:])
    assert (found["hides"], found["scope"]) == (True, None)


def test_where_no_scope_hides_it_none_is_advised(tmp_path: Path) -> None:
    path = written(tmp_path, {"representatives": 8})
    found = planned(path, "--ranks", 64, "--row-bytes", "16KiB", "--step-ms", 0.001, "--batch", 8)
    assert (found["hides"], found["scope"]) == (False, None)


def test_a_node_has_as_many_ranks_as_the_links_say(tmp_path: Path) -> None:
    path = written(tmp_path, {"representatives": 8, "sampling": {"scope": "node"}})
    found = planned(path, "--ranks", 64, "--row-bytes", 64, "--step-ms", 1, "--batch", 8, "--node", 4)
    assert found["messages"] == 3


@pytest.mark.parametrize("strategy", ["er", "x-der"])
def test_ranks_that_draw_from_themselves_send_nothing(strategy: str, tmp_path: Path) -> None:
    path = written(tmp_path, {"sampling": {"scope": "local"}, "strategy": {"name": strategy}})
    found = planned(path, "--ranks", 64, "--row-bytes", 64, "--step-ms", 1, "--batch", 8)
    assert (found["rows_bytes"], found["headers_bytes"], found["messages"]) == (0, 0, 0)


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


def model(load: Load, ranks: int, links: Links, rank_ns: float = 0, copy_gb_s: float = 1) -> Times:
    return times(load, ranks, links, draw_us=0, rank_ns=rank_ns, copy_gb_s=copy_gb_s)


def test_headers_go_round_a_ring_and_rows_straight_to_their_reader() -> None:
    found = model(LOAD, 8, PLAIN, rank_ns=125_000)
    assert found.headers == pytest.approx(1 + 6 * 10 + 100 + 8 * 80 / 0.5e6)
    assert found.draw == pytest.approx(1.0)
    assert found.copies == pytest.approx(2.0)
    assert found.rows == pytest.approx(1 + 1000 + 7 / 8 * 1e6 / 0.5e6), "one row, one message"
    assert found.total == pytest.approx(found.headers + found.draw + found.copies + found.rows)


def test_headers_are_shared_by_the_exchanges_without_any() -> None:
    often, seldom = model(LOAD, 8, PLAIN), model(replace(LOAD, header_every=50), 8, PLAIN)
    assert seldom.headers == pytest.approx(often.headers / 50)
    assert header_ms(replace(LOAD, header_every=50), 8, PLAIN) == pytest.approx(often.headers)


def test_within_a_node_only_its_own_links_count() -> None:
    found = model(LOAD, 4, replace(PLAIN, net_hop_us=1e9, net_gb_s=1e-9))
    assert found.headers == pytest.approx(1 + 3 * 10 + 4 * 80 / 1e6)


def test_a_rank_sends_to_as_many_ranks_as_there_are_or_as_it_has_rows() -> None:
    assert [replace(LOAD, replayed=8).messages(ranks) for ranks in (1, 2, 8, 16, 1024)] == [0, 1, 7, 8, 8]
    assert replace(LOAD, replayed=8, group=4).messages(1024) == 3


def test_crowded_cores_take_turns() -> None:
    links = replace(PLAIN, node=16)
    alone = model(LOAD, 16, replace(links, cores=16))
    assert alone == model(LOAD, 16, links)
    crowded = model(LOAD, 16, replace(links, cores=2))
    assert crowded.headers == pytest.approx(8 * alone.headers)
    assert crowded.rows == pytest.approx(8 * alone.rows)


def test_a_group_costs_the_same_however_many_ranks_there_are_but_for_the_headers_of_all() -> None:
    load = replace(LOAD, group=8, header_every=LONGEST)
    few, many = (model(load, ranks, PLAIN, rank_ns=100) for ranks in (64, 4096))
    assert (few.draw, few.rows) == (many.draw, many.rows)
    ring = (header_ms(load, 4096, PLAIN) - header_ms(load, 64, PLAIN)) / LONGEST
    assert many.headers - few.headers == pytest.approx(ring)


def test_one_rank_and_local_draws_need_no_links() -> None:
    for load, ranks in ((LOAD, 1), (replace(LOAD, row_trips=0), 512)):
        found = model(load, ranks, PLAIN, rank_ns=1e6)
        assert (found.headers, found.draw, found.rows) == (0, 1, 0)


@pytest.mark.parametrize(
    ("keys", "seldom"),
    [
        ({"ratio": 0.25}, True),
        ({"ratio": 0.25, "losses_every": 5}, True),
        ({"ratio": 0.25, "sampling": {"weights": "balanced"}, "buffer": {"partition_by": "y"}}, False),
        ({"ratio": 0.25, "losses_every": 1, "guard": {"bound": 1.1}}, False),
        ({"ratio": {"budget": 0.02}, "buffer": {"partition_by": "domain"}}, False),
        ({"sampling": {"weights": "forgetting"}, "buffer": {"partition_by": "domain"}}, False),
        ({"ratio": 0.25, "ratio_in": "tokens"}, False),
    ],
)
def test_jobs_with_news_in_every_step_are_known(keys: dict[str, Any], seldom: bool) -> None:
    assert has_seldom_news(RehearsalConfig.load(keys)) == seldom


def test_the_load_follows_the_schedule_and_the_strategy() -> None:
    def load(**keys: Any) -> Load:
        return load_of(RehearsalConfig.load(keys), 64, batch=10, accumulation=3)

    assert load(ratio=0.5).replayed == 30
    assert load(ratio=0.5, mode="replace").replayed == 15
    assert load(ratio=0.05, ratio_schedule={"to": 0.5, "steps": 100}).replayed == 30
    assert load(ratio=0.5, ratio_schedule={"to": 0.05, "steps": 100}).replayed == 30
    assert load(representatives=4).replayed == 12
    assert load(representatives=4, strategy={"name": "der++"}).replayed == 24
    assert load(strategy={"name": "x-der"}, buffer={"partition_by": "label"}).row_trips == 2
    balanced = load(buffer={"partition_by": "label"}, sampling={"weights": "balanced"})
    assert balanced.header_bytes == WORD_BYTES * (FIXED + 16)
    assert (load(sampling={"scope": 32}).group, load(sampling={"scope": "node"}).within_node) == (32, True)
    assert load(candidates=4).offered == 12


def test_coverage_is_what_was_offered_until_the_buffers_are_full() -> None:
    assert coverage(10, 4, 400, 1.0) == 0.1
    assert coverage(10, 4, 20, 1.0) == 1.0
    assert coverage(10, 4, 20, 0.5) == 0.5


def test_every_named_figure_has_a_source() -> None:
    assert all(links.source for links in LINKS.values())


def test_a_budget_is_planned_for_with_its_highest_ratio_and_its_words() -> None:
    block: dict[str, Any] = {"buffer": {"partition_by": "domain"}, "mode": "replace"}
    budget = load_of(RehearsalConfig.load({**block, "ratio": {"budget": 0.02, "max": 0.5}}), 100, 16)
    fixed = load_of(RehearsalConfig.load({**block, "ratio": 0.5}), 100, 16)
    assert budget.replayed == fixed.replayed == 8
    assert budget.header_bytes == fixed.header_bytes + 8 * PARTITION_WORDS
