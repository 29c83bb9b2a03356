"""The `rehearsal` section: what it takes, from where, and how it is refused."""

from __future__ import annotations

import base64
import json
import pickle
import tempfile
import traceback
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import pydantic
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from pydantic import BaseModel, ValidationError

from rehearsal_plugin.config import (
    BufferConfig,
    ExchangeConfig,
    RehearsalConfig,
    SamplingConfig,
    StrategyConfig,
    find_block,
    json_schema,
)
from rehearsal_plugin.config.__main__ import main
from rehearsal_plugin.errors import ConfigError, RehearsalError
from tests.helpers.fuzzing import PROPERTY
from tests.helpers.paths import ROOT

EVERY_KEY: dict[str, Any] = {
    "enabled": True,
    "buffer": {
        "capacity": "4GiB",
        "storage": "mmap",
        "path": "/scratch/rows",
        "policy": "score",
        "partition_by": "labels",
        "partition": None,
        "score_by": "doubts",
        "preload": "old",
        "deduplicate": True,
    },
    "ratio": 0.125,
    "ratio_in": "tokens",
    "ratio_schedule": {"to": 0.25, "steps": 100},
    "representatives": None,
    "candidates": 14,
    "mode": "replace",
    "inject": "loader",
    "fields": ["inputs", "labels", "doubts"],
    "hidden": ["doubts"],
    "padding": {"length": 128, "values": {"inputs": 0}, "token_id": None},
    "packing": "rows",
    "rows_per_sample": 1,
    "sample_layout": "interleaved",
    "sampling": {
        "scope": "global",
        "weights": "balanced",
        "retrieved_share": 0.75,
        "queries": 4,
        "weights_file": "mixture.json",
    },
    "strategy": {
        "name": "topk",
        "loss_weight": 0.5,
        "alpha": 0.1,
        "beta": 0.2,
        "gamma": 0.3,
        "partition_weights": {"0": 1.0, "3": 2.5},
        "outputs": ["logits"],
        "k": 8,
        "transform": "all",
    },
    "exchange": {"backend": "gloo", "timeout_s": 30.0, "on_failure": "local", "launch": "inline"},
    "checkpoint": {"enabled": False, "asynchronous": True, "incremental": True, "write_timeout_s": 60.0},
    "metrics": {"file": "metrics.jsonl", "every": 5, "rotate": "1MiB"},
    "non_finite": "skip",
    "losses_every": 10,
    "guard": {"bound": 1.2, "window": 50, "action": "raise_ratio", "partitions": [0], "factor": 2.0, "most": 0.4},
    "retrieval": {
        "embedding": "doubts",
        "module": "encoder.layer.3",
        "pool": "last",
        "mask": "mask",
        "refresh": False,
        "metric": "l2",
        "index": "ivf",
        "lists": 256,
        "probes": 16,
        "neighbours": 24,
        "build_width": 60,
        "search_width": 90,
        "exact_below": 100,
        "rebuild": 0.25,
    },
    "start_step": 300,
    "seed": 7,
}

DEEPSPEED = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 1}}


def refusal(block: Any) -> str:
    """The message with which a section is refused."""
    with pytest.raises(ConfigError) as caught:
        RehearsalConfig.load(block)
    return str(caught.value)


# What a section may hold


def test_an_empty_section_takes_the_documented_defaults() -> None:
    assert RehearsalConfig.load({}).model_dump() == {
        "enabled": True,
        "buffer": {
            "capacity": "1GiB",
            "storage": "memory",
            "path": None,
            "policy": "reservoir",
            "partition_by": None,
            "partition": None,
            "score_by": None,
            "preload": None,
            "deduplicate": False,
        },
        "ratio": 0.05,
        "ratio_in": "rows",
        "ratio_schedule": None,
        "representatives": None,
        "candidates": None,
        "mode": "append",
        "inject": "forward",
        "fields": None,
        "hidden": None,
        "padding": None,
        "packing": "documents",
        "rows_per_sample": 1,
        "sample_layout": "halves",
        "sampling": {
            "scope": "global",
            "weights": "uniform",
            "retrieved_share": 0.5,
            "queries": 16,
            "weights_file": None,
        },
        "strategy": {
            "name": "er",
            "loss_weight": 1.0,
            "alpha": 0.5,
            "beta": 0.5,
            "gamma": 0.75,
            "partition_weights": None,
            "outputs": None,
            "k": 16,
            "transform": "replayed",
        },
        "exchange": {"backend": "auto", "timeout_s": 600.0, "on_failure": "raise", "launch": "auto"},
        "checkpoint": {"enabled": True, "asynchronous": False, "incremental": False, "write_timeout_s": 1800.0},
        "metrics": {"file": None, "every": 10, "rotate": "16MiB"},
        "non_finite": "keep",
        "losses_every": 0,
        "guard": None,
        "retrieval": None,
        "start_step": 0,
        "seed": 0,
    }


def test_retrieval_is_exact_and_by_cosine_unless_told_otherwise() -> None:
    config = RehearsalConfig.load({"retrieval": {}}).retrieval
    assert config is not None
    assert config.model_dump() == {
        "embedding": "rehearsal.embedding",
        "module": None,
        "pool": "mean",
        "mask": "attention_mask",
        "refresh": True,
        "metric": "cosine",
        "index": "flat",
        "lists": None,
        "probes": 64,
        "neighbours": 32,
        "build_width": 80,
        "search_width": 128,
        "exact_below": 4096,
        "rebuild": 0.5,
    }


def test_every_key_can_be_given() -> None:
    assert RehearsalConfig.load(EVERY_KEY).model_dump() == EVERY_KEY


def test_representatives_replace_the_default_ratio() -> None:
    assert RehearsalConfig(representatives=7).ratio is None


def test_the_ratio_is_kept_as_given() -> None:
    assert RehearsalConfig(ratio=0.25).ratio == 0.25


def test_null_for_both_amounts_means_the_default_ratio() -> None:
    assert RehearsalConfig.load({"ratio": None, "representatives": None}).ratio == 0.05


@pytest.mark.parametrize("block", [{"ratio": 0}, {"ratio": 0.0}, {"representatives": 0}])
def test_nothing_replayed_is_a_valid_amount(block: dict[str, Any]) -> None:
    config = RehearsalConfig.load(block)
    assert not config.ratio
    assert not config.representatives


def test_a_whole_number_of_seconds_is_a_timeout() -> None:
    assert ExchangeConfig(timeout_s=5).timeout_s == 5.0


def test_sections_can_be_given_as_models() -> None:
    assert RehearsalConfig(buffer=BufferConfig(capacity=9)).buffer.capacity == 9


def test_a_config_cannot_be_changed() -> None:
    config = RehearsalConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1


def test_a_config_is_plain_json() -> None:
    assert json.loads(json.dumps(RehearsalConfig.load(EVERY_KEY).model_dump())) == EVERY_KEY


def test_a_config_survives_pickling() -> None:
    config = RehearsalConfig.load(EVERY_KEY)
    assert pickle.loads(pickle.dumps(config)) == config


def test_the_defaults_load_again_from_their_own_dump() -> None:
    assert RehearsalConfig.load(RehearsalConfig().model_dump()) == RehearsalConfig()


def test_loading_leaves_the_section_as_it_was() -> None:
    block: dict[str, Any] = {"buffer": {"capacity": 5}}
    RehearsalConfig.load(block)
    assert block == {"buffer": {"capacity": 5}}


# Sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64B", 64),
        ("64 bytes", 64),
        ("1KB", 10**3),
        ("1KiB", 2**10),
        ("512 MiB", 512 * 2**20),
        ("1.5GB", 1_500_000_000),
        ("4GiB", 4 * 2**30),
        (" 4 gib ", 4 * 2**30),
        ("0.5TiB", 2**39),
        ("1PB", 10**15),
    ],
)
def test_a_size_is_bytes(text: str, size: int) -> None:
    assert BufferConfig(capacity=text).rows(1) == size


def test_a_size_holds_whole_rows_only() -> None:
    assert BufferConfig(capacity="1KiB").rows(100) == 10


def test_a_size_holds_one_row_exactly() -> None:
    assert BufferConfig(capacity="100B").rows(100) == 1


def test_a_number_is_rows_of_any_length() -> None:
    assert BufferConfig(capacity=500).rows(10**12) == 500


def test_a_size_below_one_row_is_refused_with_the_least_size() -> None:
    with pytest.raises(ConfigError, match=r"rehearsal\.buffer\.capacity '1KB' .*2000 bytes.*'2000B'"):
        BufferConfig(capacity="1KB").rows(2000)


@pytest.mark.parametrize(
    "capacity",
    [0, -1, "0GiB", "0.1B", "4", "4G", "GiB", "-4GiB", "4 rows", "", "٤GiB", True, 4.0, None, [4], 2**63, "1" * 30],
)  # fmt: skip
def test_a_capacity_that_is_no_size_is_refused(capacity: object) -> None:
    assert refusal({"buffer": {"capacity": capacity}}).startswith(
        "rehearsal.buffer.capacity must be a whole number of rows above 0, or a size such as '4GiB', not "
    )


# Wrong values


@pytest.mark.parametrize(
    ("path", "value", "demand"),
    [
        ("enabled", "yes", "boolean"),
        ("enabled", 1, "boolean"),
        ("ratio", 1, "less than 1"),
        ("ratio", -0.1, "greater than or equal to 0"),
        ("ratio", "0.1", "number"),
        ("ratio", True, "number"),
        ("ratio", float("nan"), "finite"),
        ("representatives", -1, "greater than or equal to 0"),
        ("representatives", 7.0, "integer"),
        ("representatives", True, "integer"),
        ("representatives", 2**63, "less than"),
        ("candidates", 0, "greater than or equal to 1"),
        ("mode", "insert", "'append' or 'replace'"),
        ("inject", "model", "'forward' or 'loader'"),
        ("fields", [], "at least 1 item"),
        ("fields", "labels", "list"),
        ("buffer.storage", "disk", "'memory', 'pinned', 'cuda' or 'mmap'"),
        ("buffer.policy", "lru", "'reservoir', 'balanced', 'random_replace', 'fifo', 'score', 'herding'"),
        ("buffer.partition_by", 3, "string"),
        ("buffer.partition_by", "", "at least 1 character"),
        ("buffer.score_by", 3, "string"),
        ("buffer.score_by", "", "at least 1 character"),
        ("sampling.scope", "hosts", "'global', 'node' or 'local'"),
        ("sampling.weights", [1, 2], "'uniform', 'balanced', 'score', 'retrieved', 'stream' or 'forgetting'"),
        ("sampling.weights", {"code": 1}, "partitions"),
        ("sampling.weights", {"1": 0}, "above 0"),
        ("strategy.partition_weights", {}, "above 0"),
        ("strategy.transform", "none", "'replayed'"),
        ("exchange.backend", "mpi", "'auto', 'gloo' or 'nccl'"),
        ("exchange.launch", "process", "'auto', 'thread' or 'inline'"),
        ("exchange.timeout_s", 0, "greater than 0"),
        ("exchange.timeout_s", float("inf"), "finite"),
        ("exchange.timeout_s", 1e300, "less than or equal to"),
        ("start_step", -1, "greater than or equal to 0"),
        ("start_step", None, "integer"),
        ("seed", -1, "greater than or equal to 0"),
        ("seed", 2**63, "less than"),
    ],
)
def test_a_wrong_value_is_refused_by_its_key_path(path: str, value: object, demand: str) -> None:
    *sections, name = path.split(".")
    block: dict[str, Any] = {name: value}
    for section in reversed(sections):
        block = {section: block}
    message = refusal(block)
    assert message.startswith(f"rehearsal.{path} must ")
    assert demand in message
    assert "\n" not in message


def test_a_wrong_value_is_shown() -> None:
    assert "not 1.5." in refusal({"ratio": 1.5})


def test_a_wrong_value_is_answered_with_what_the_key_means() -> None:
    assert refusal({"ratio": 1.5}).endswith(RehearsalConfig.model_fields["ratio"].description or "?")


def test_a_very_long_value_is_cut() -> None:
    assert len(refusal({"ratio": "x" * 10_000})) < 500


def test_an_item_of_a_list_is_refused_by_its_place() -> None:
    assert refusal({"fields": ["inputs", 3]}).startswith("rehearsal.fields.1 must be a valid string, not 3")


@pytest.mark.parametrize("value", [None, 5, "4GiB", [1]])
def test_a_section_that_is_no_mapping_is_refused_with_its_keys(value: object) -> None:
    message = refusal({"buffer": value})
    assert message.startswith("rehearsal.buffer must be a mapping with keys out of capacity, storage, path")


@pytest.mark.parametrize("key", ["ratio", "representatives", "seed", "mode", "enabled"])
def test_auto_is_refused_with_the_reason(key: str) -> None:
    message = refusal({key: "auto"})
    assert message.startswith(f"rehearsal.{key} must ")
    assert "'auto' is filled in only for the keys of the framework itself" in message


@pytest.mark.parametrize("key", ["capacity", "storage", "path", "partition_by", "score_by"])
def test_auto_is_refused_in_the_buffer(key: str) -> None:
    message = refusal({"buffer": {key: "auto"}})
    assert message.startswith(f"rehearsal.buffer.{key} must ")
    assert "'auto' is filled in only" in message


def test_all_problems_are_told_at_once() -> None:
    message = refusal({"ratio": 2, "bufer": {}, "exchange": {"timeout_s": -1}})
    assert message.splitlines()[0] == "the 'rehearsal' section has 3 problems:"
    assert [line.split()[1] for line in message.splitlines()[1:]] == [
        "rehearsal.ratio",
        "rehearsal.exchange.timeout_s",
        "rehearsal.bufer",
    ]


# Unknown keys


@pytest.mark.parametrize(
    ("block", "wrong", "right"),
    [
        ({"bufer": {}}, "rehearsal.bufer", "rehearsal.buffer"),
        ({"startStep": 1}, "rehearsal.startStep", "rehearsal.start_step"),
        ({"Ratio": 0.1}, "rehearsal.Ratio", "rehearsal.ratio"),
        ({"buffer": {"capcity": 1}}, "rehearsal.buffer.capcity", "rehearsal.buffer.capacity"),
        ({"capacity": 1}, "rehearsal.capacity", "rehearsal.buffer.capacity"),
        ({"timeout": 1}, "rehearsal.timeout", "rehearsal.exchange.timeout_s"),
        ({"buffer": {"ratio": 0.1}}, "rehearsal.buffer.ratio", "rehearsal.ratio"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_right_one(block: Any, wrong: str, right: str) -> None:
    message = refusal({"ratio": 0.1, **block})
    assert message == f"{wrong} is not a key of the section; did you mean '{right}'?"


def test_an_unknown_key_like_no_other_is_refused_with_all_keys() -> None:
    assert refusal({"sampling": {"zzz": 1}}) == (
        "rehearsal.sampling.zzz is not a key of the section; it has the keys "
        "scope, weights, retrieved_share, queries, weights_file"
    )


def test_a_key_that_is_no_text_is_refused() -> None:
    assert refusal({1: 2}).startswith("rehearsal.1 is not a key of the section")
    assert refusal({"<name>": 2}).startswith("rehearsal.<name> is not a key of the section")


# Keys that do not go together


def test_ratio_and_representatives_are_refused_together() -> None:
    message = refusal({"ratio": 0.1, "representatives": 7})
    assert message.startswith("rehearsal.ratio and rehearsal.representatives")
    assert message.endswith("keep one of them")


def test_mmap_needs_a_path() -> None:
    assert refusal({"buffer": {"storage": "mmap"}}).startswith("rehearsal.buffer.path is missing")


def test_a_path_needs_mmap() -> None:
    assert refusal({"buffer": {"path": "/tmp/rows"}}).startswith("rehearsal.buffer.path has no use")


def test_the_balanced_policy_needs_partitions() -> None:
    message = refusal({"buffer": {"policy": "balanced"}})
    assert message.startswith("rehearsal.buffer.partition_by is missing: policy 'balanced'")


def test_balanced_weights_need_partitions() -> None:
    message = refusal({"sampling": {"weights": "balanced"}})
    assert message.startswith("rehearsal.buffer.partition_by is missing: rehearsal.sampling.weights")


def test_the_partition_field_must_be_part_of_the_row() -> None:
    message = refusal({"fields": ["inputs"], "buffer": {"partition_by": "labels"}})
    assert message.startswith("rehearsal.fields lacks 'labels'")


JUDGING = ["score", "herding", "closest_to_centre"]


@pytest.mark.parametrize("policy", JUDGING)
def test_a_policy_that_judges_rows_needs_something_to_judge_them_by(policy: str) -> None:
    message = refusal({"buffer": {"policy": policy}})
    assert message.startswith(f"rehearsal.buffer.score_by is missing: policy '{policy}'")
    assert ("'loss'" in message) == (policy == "score")


@pytest.mark.parametrize("policy", JUDGING)
def test_a_policy_that_judges_rows_takes_a_field(policy: str) -> None:
    assert BufferConfig.model_validate({"policy": policy, "score_by": "inputs"}).score_by == "inputs"


@pytest.mark.parametrize("policy", ["herding", "closest_to_centre"])
def test_a_loss_is_no_features(policy: str) -> None:
    message = refusal({"buffer": {"policy": policy, "score_by": "loss"}})
    assert message == f"rehearsal.buffer.score_by is 'loss', and policy '{policy}' needs a batch field of features"


def test_weights_by_score_need_a_score() -> None:
    message = refusal({"sampling": {"weights": "score"}})
    assert message.startswith("rehearsal.buffer.score_by is missing: rehearsal.sampling.weights 'score'")


@pytest.mark.parametrize("policy", ["herding", "closest_to_centre"])
def test_features_are_no_weights(policy: str) -> None:
    message = refusal({"buffer": {"policy": policy, "score_by": "inputs"}, "sampling": {"weights": "score"}})
    assert message.startswith(f"rehearsal.sampling.weights is 'score', and rehearsal.buffer.policy '{policy}'")


@pytest.mark.parametrize("policy", ["reservoir", "balanced", "random_replace", "fifo"])
def test_a_score_that_nothing_looks_at_is_refused(policy: str) -> None:
    block = {"policy": policy, "partition_by": "labels", "score_by": "doubts"}
    assert refusal({"buffer": block}).startswith("rehearsal.buffer.score_by has no use")
    assert RehearsalConfig.load({"buffer": block, "sampling": {"weights": "score"}}).buffer.score_by == "doubts"


@pytest.mark.parametrize("policy", JUDGING)
def test_the_field_that_rows_are_judged_by_must_be_part_of_the_row(policy: str) -> None:
    message = refusal({"fields": ["inputs"], "buffer": {"policy": policy, "score_by": "doubts"}})
    assert message.startswith("rehearsal.fields lacks 'doubts', which rehearsal.buffer.score_by names")


def test_the_loss_is_no_field_of_the_batch() -> None:
    config = RehearsalConfig.load({"fields": ["inputs"], "buffer": {"policy": "score", "score_by": "loss"}})
    assert config.buffer.by_loss


def test_nccl_is_refused_in_a_thread() -> None:
    message = refusal({"exchange": {"backend": "nccl", "launch": "thread"}})
    assert message.startswith("rehearsal.exchange.launch 'thread'")
    assert "'inline'" in message


@pytest.mark.parametrize("launch", ["auto", "inline"])
def test_nccl_is_taken_otherwise(launch: str) -> None:
    config = RehearsalConfig.load({"exchange": {"backend": "nccl", "launch": launch}})
    assert config.exchange.launch == launch


def test_the_embedding_is_a_field_of_the_rows_unless_a_module_gives_it() -> None:
    message = refusal({"fields": ["inputs"], "retrieval": {"embedding": "vectors"}})
    assert message.startswith("rehearsal.fields lacks 'vectors', which rehearsal.retrieval.embedding names")
    assert RehearsalConfig.load({"fields": ["inputs"], "retrieval": {"module": "encoder"}}).retrieval is not None


def test_an_inverted_file_is_not_probed_in_more_lists_than_it_has() -> None:
    assert "there are 10 lists" in refusal({"retrieval": {"embedding": "x", "lists": 10, "probes": 11}})


def test_broken_rules_of_one_section_are_told_at_once() -> None:
    message = refusal({"buffer": {"storage": "mmap", "policy": "balanced"}})
    assert message.startswith("the 'rehearsal' section has 2 problems:")


# What is raised


def test_a_config_error_is_a_value_error() -> None:
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, RehearsalError)


def test_direct_construction_raises_the_same_error_as_loading() -> None:
    with pytest.raises(ConfigError) as caught:
        RehearsalConfig(ratio=0.1, representatives=7)
    assert str(caught.value) == refusal({"ratio": 0.1, "representatives": 7})


@pytest.mark.parametrize(
    ("section", "path"),
    [
        (BufferConfig, "rehearsal.buffer"),
        (SamplingConfig, "rehearsal.sampling"),
        (StrategyConfig, "rehearsal.strategy"),
        (ExchangeConfig, "rehearsal.exchange"),
        (RehearsalConfig, "rehearsal"),
    ],
)
def test_direct_construction_of_a_section_names_the_key_path(section: type[BaseModel], path: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{path}\.xyz is not a key"):
        section(xyz=1)


def test_nested_values_keep_their_key_path_in_direct_construction() -> None:
    values: dict[str, Any] = {"buffer": {"storage": "disk"}}
    with pytest.raises(ConfigError, match=r"^rehearsal\.buffer\.storage must be"):
        RehearsalConfig(**values)


def test_the_traceback_does_not_show_the_error_of_pydantic() -> None:
    with pytest.raises(ConfigError) as caught:
        RehearsalConfig(ratio=2)
    assert "ValidationError" not in "".join(traceback.format_exception(caught.value))


def test_a_section_within_a_users_own_model_is_refused_as_pydantic_does() -> None:
    class Job(BaseModel):
        rehearsal: RehearsalConfig

    with pytest.raises(ValidationError, match=r"rehearsal\.buffer\.capacity"):
        Job.model_validate({"rehearsal": {"buffer": {"capacity": 0}}})


# Where a section comes from


def test_a_config_loads_as_itself() -> None:
    config = RehearsalConfig(seed=3)
    assert RehearsalConfig.load(config) is config


def test_the_section_is_taken_from_a_whole_deepspeed_config() -> None:
    assert RehearsalConfig.load({**DEEPSPEED, "rehearsal": {"seed": 3}}).seed == 3


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", ["config.json", "config.yaml", "config.yml", "config"])
def test_a_section_is_read_from_a_file(tmp_path: Path, name: str, whole: bool) -> None:
    config = {**DEEPSPEED, "rehearsal": EVERY_KEY} if whole else EVERY_KEY
    path = tmp_path / name
    path.write_text(yaml.safe_dump(config) if "y" in path.suffix else json.dumps(config))
    assert RehearsalConfig.load(path) == RehearsalConfig.load(str(path)) == RehearsalConfig.load(EVERY_KEY)


@pytest.mark.parametrize("config", [EVERY_KEY, {**DEEPSPEED, "rehearsal": EVERY_KEY}])
def test_a_section_is_read_from_base64(config: dict[str, Any]) -> None:
    encoded = base64.urlsafe_b64encode(json.dumps(config).encode()).decode()
    assert RehearsalConfig.load(encoded) == RehearsalConfig.load(EVERY_KEY)


def test_comments_are_read_as_deepspeed_reads_them(tmp_path: Path) -> None:
    pytest.importorskip("hjson")
    path = tmp_path / "config.json"
    path.write_text('{"train_batch_size": 8, // all ranks\n "rehearsal": {"seed": 3}}')
    assert RehearsalConfig.load(path).seed == 3


@pytest.mark.parametrize("kind", [OrderedDict, MappingProxyType])
def test_a_section_is_read_from_any_mapping(kind: Any) -> None:
    assert RehearsalConfig.load(kind({"rehearsal": kind({"seed": 3})})).seed == 3


def test_the_block_is_found_as_it_was_written() -> None:
    assert find_block({**DEEPSPEED, "rehearsal": {"ratio": 7}}) == {"ratio": 7}


def test_a_bare_block_is_found_as_itself() -> None:
    assert find_block({"ratio": 0.1}) == {"ratio": 0.1}


def test_an_empty_bare_block_is_a_block() -> None:
    assert find_block({}) == {}


def test_the_block_of_a_config_is_its_dump() -> None:
    assert find_block(RehearsalConfig(seed=3)) == RehearsalConfig(seed=3).model_dump()


@pytest.mark.parametrize(
    "config",
    [DEEPSPEED, {"train_batch_size": 8}, {"elasticity": {"enabled": True}}, {"train_batch_size": "auto"}],
)
def test_a_deepspeed_config_without_the_section_has_no_block(config: dict[str, Any]) -> None:
    assert find_block(config) is None


def test_loading_a_deepspeed_config_without_the_section_is_refused() -> None:
    assert refusal(DEEPSPEED).startswith("the DeepSpeed config has no 'rehearsal' section; add one")


@pytest.mark.parametrize("key", ["rehersal", "Rehearsal", "rehearsals", "reherasal"])
def test_a_misspelt_section_is_not_overlooked(key: str) -> None:
    with pytest.raises(ConfigError, match=f"a key '{key}'; did you mean 'rehearsal'"):
        find_block({**DEEPSPEED, key: {}})


@pytest.mark.parametrize("block", [None, True, 0.05, "4GiB", []])
def test_a_block_that_is_no_mapping_is_refused(block: object) -> None:
    with pytest.raises(ConfigError, match=r"^rehearsal must be a mapping of keys, not "):
        find_block({**DEEPSPEED, "rehearsal": block})


@pytest.mark.parametrize("source", ["", "missing.json", "AAAA", "e30", "ä", "a\0b", b"e30=", 5, None, []])
def test_a_source_of_no_known_form_is_refused(source: Any) -> None:
    assert refusal(source).startswith("the rehearsal config ")


def test_a_missing_file_is_said_to_be_missing() -> None:
    assert refusal("missing.json").startswith("the rehearsal config 'missing.json' is no file; correct the path")
    assert "base64" not in refusal("configs/missing.yaml")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b""),
        ("a.json", b"[1]"),
        ("a.json", b"{"),
        ("a.json", b"\xff"),
        ("a.yaml", b""),
        ("a.yaml", b"- 1"),
        ("a.yaml", b"a: b: c"),
        ("a.yaml", b"seed: 2001-13-45"),
        ("a.yaml", b"? [1]\n: 2"),
    ],
)
def test_a_file_that_holds_no_mapping_is_refused_by_name(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=r"the rehearsal config '.*(cannot be read|must hold a mapping)"):
        find_block(tmp_path / name)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert "cannot be read: correct the file" in refusal(tmp_path)


# The published schema


@pytest.mark.skipif(Version(pydantic.VERSION) < Version("2.14"), reason="pydantic before 2.14 words it otherwise")
def test_the_published_schema_is_up_to_date() -> None:
    published = (ROOT / "docs" / "rehearsal.schema.json").read_text()
    assert json.loads(published) == json_schema(), "run: python -m rehearsal_plugin.config"


def test_the_schema_is_written_where_asked(tmp_path: Path) -> None:
    main([str(tmp_path / "schema.json")])
    assert json.loads((tmp_path / "schema.json").read_text()) == json_schema()


def test_every_key_of_the_schema_is_described() -> None:
    schema = json_schema()
    sections = {f"#/$defs/{name}": section for name, section in schema["$defs"].items()}
    keys = [pair for section in (schema, *sections.values()) for pair in section["properties"].items()]
    assert len(keys) > 24
    assert [name for name, key in keys if not {**sections.get(key.get("$ref"), {}), **key}.get("description")] == []


# Anything at all

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=10,
)
KNOWN_VALUES = st.sampled_from(
    ["auto", "append", "replace", "balanced", "mmap", "nccl", "thread", "4GiB", "labels", 0.5, 7, ["labels"]]
)


def section(model: type[BaseModel]) -> st.SearchStrategy[dict[str, Any]]:
    """Mappings with right and wrong keys, and right and wrong values."""
    values: dict[str, st.SearchStrategy[Any]] = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        inner = [k for k in (kind, *get_args(kind)) if isinstance(k, type) and issubclass(k, BaseModel)]
        nested = section(inner[0]) if inner else st.nothing()
        values[name] = KNOWN_VALUES | JSON_VALUES | nested
    known = st.fixed_dictionaries({}, optional=values)
    return st.builds(lambda a, b: {**a, **b}, st.dictionaries(st.text(max_size=8), JSON_VALUES, max_size=1), known)


@pytest.mark.fuzz
@PROPERTY
@given(section(RehearsalConfig))
def test_any_section_gives_a_config_or_a_config_error(block: dict[str, Any]) -> None:
    try:
        config = RehearsalConfig.load({"rehearsal": block})
    except ConfigError:
        return
    assert RehearsalConfig.load(json.loads(json.dumps(config.model_dump()))) == config


@pytest.mark.fuzz
@PROPERTY
@given(JSON_VALUES | st.text())
def test_any_source_gives_a_block_or_none_or_a_config_error(source: Any) -> None:
    try:
        block = find_block(source)
    except ConfigError:
        return
    assert block is None or isinstance(block, dict)


@pytest.mark.fuzz
@PROPERTY
@given(st.binary(max_size=200) | JSON_VALUES.map(lambda value: json.dumps({"rehearsal": value}).encode()))
@pytest.mark.parametrize("name", ["config.json", "config.yaml"])
def test_any_file_gives_a_config_or_a_config_error(name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        with suppress(ConfigError):
            RehearsalConfig.load(path)


@PROPERTY
@given(st.integers(1, 2**40), st.integers(1, 2**20))
def test_the_rows_of_a_size_fill_it_as_far_as_whole_rows_can(size: int, row_bytes: int) -> None:
    config = BufferConfig(capacity=f"{size}B")
    if size < row_bytes:
        with pytest.raises(ConfigError, match=r"rehearsal\.buffer\.capacity"):
            config.rows(row_bytes)
    else:
        assert 0 <= size - config.rows(row_bytes) * row_bytes < row_bytes
