"""`axolotl train`, begun by `python -m rehearsal_plugin.run`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("axolotl")

import yaml

from scripts.common.launch import free_port
from tests.helpers.clients.claims import assert_replay, assert_same_from
from tests.helpers.clients.runs import Run, run_client, section_file
from tests.helpers.clients.tiny_llm import LONGEST

pytestmark = pytest.mark.clients

AXOLOTL = Path(sys.executable).parent / "axolotl"
SETTINGS: dict[str, Any] = {
    "sequence_len": LONGEST,
    "attn_implementation": "sdpa",
    "bf16": False,
    "fp16": False,
    "tf32": False,
    "micro_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_steps": 8,
    "eval_steps": 4,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "optimizer": "adamw_torch",
    "lr_scheduler": "constant",
    "seed": 1,  # of the order of the rows, too
    "save_strategy": "no",
}
TEXT: dict[str, Any] = {"ds_type": "json", "type": "completion"}
PACKED: dict[str, Any] = {"sample_packing": True, "eval_sample_packing": False}


def train(tiny: Path, folder: Path, section: Path | None = None, **keys: Any) -> Run:
    """Run `axolotl train` with a file of settings for 8 steps of 4 rows, on one rank that it starts by `torchrun`.

    On two without GPUs it puts the model of each on the GPU of its number, and fails without the plugin, too.
    """
    folder.mkdir(parents=True)
    parts = {name: [{"path": str(tiny / "text" / f"{name}.jsonl"), **TEXT}] for name in ("train", "test")}
    parts["test"][0]["split"] = "train"
    paths = {"base_model": str(tiny / "model"), "output_dir": str(folder / "out")}
    paths["dataset_prepared_path"] = str(folder / "prepared")
    config = folder / "train.yaml"
    config.write_text(
        yaml.safe_dump({**paths, "datasets": parts["train"], "test_datasets": parts["test"], **SETTINGS, **keys})
    )
    launcher = ["--launcher", "torchrun", "--", "--nproc_per_node", 1, "--master_port", free_port()]
    environment = {"AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1"}
    given = [AXOLOTL, "train", config, *launcher]
    return run_client(given, folder / "run", section=section, ranks=1, environment=environment, may_abort=True)


@pytest.mark.parametrize(
    ("keys", "passes"),
    [
        pytest.param({}, 1, id="text"),
        pytest.param(PACKED, 1, id="sample_packing"),
        pytest.param({"gradient_accumulation_steps": 2}, 2, id="text, accumulation"),
    ],
)
def test_rows_are_replayed(tiny: Path, tmp_path: Path, keys: dict[str, Any], passes: int) -> None:
    plain = train(tiny, tmp_path / "plain", **keys)
    replayed = train(tiny, tmp_path / "replayed", section_file(tmp_path), **keys)
    assert_replay(plain, replayed, passes=passes)


def test_a_resumed_run_goes_on_bit_for_bit(tiny: Path, tmp_path: Path) -> None:
    section = section_file(tmp_path)
    saves: dict[str, Any] = {"save_strategy": "steps", "save_steps": 5}
    whole = train(tiny, tmp_path / "whole", section, **saves)
    checkpoint = str(tmp_path / "whole" / "out" / "checkpoint-5")
    assert_same_from(whole, train(tiny, tmp_path / "again", section, **saves, resume_from_checkpoint=checkpoint), 5)
