"""`llamafactory-cli train` on two ranks that it starts itself, begun by `python -m rehearsal_plugin.run`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llamafactory")

import yaml

from scripts.common.launch import free_port
from tests.helpers.clients.claims import assert_replay, assert_same_from
from tests.helpers.clients.runs import Run, run_client, section_file
from tests.helpers.clients.tiny_llm import LONGEST

pytestmark = pytest.mark.clients

LLAMAFACTORY = Path(sys.executable).parent / "llamafactory-cli"
DATASETS: dict[str, Any] = {
    "text": {"columns": {"prompt": "text"}},
    "alpaca": {},
    "ranking": {"ranking": True, "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}},
}
SETTINGS: dict[str, Any] = {
    "do_train": True,
    "finetuning_type": "full",
    "template": "default",
    "cutoff_len": LONGEST,
    "max_steps": 8,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "eval_strategy": "steps",
    "eval_steps": 4,
    "eval_on_start": True,
    "disable_gradient_checkpointing": True,
    "disable_tqdm": True,
    "use_cpu": True,
}


def train(tiny: Path, folder: Path, stage: str, data: str, *, section: Path | None = None, **keys: Any) -> Run:
    """Run a stage by the command of LLaMA-Factory, which starts `torchrun`."""
    folder.mkdir(parents=True)
    names = {f"{data}_{part}": {"file_name": f"{tiny}/{data}/{part}.jsonl"} for part in ("train", "test")}
    (folder / "dataset_info.json").write_text(json.dumps({n: {**f, **DATASETS[data]} for n, f in names.items()}))
    named = {"stage": stage, "dataset": f"{data}_train", "eval_dataset": f"{data}_test", "dataset_dir": str(folder)}
    settings = {"model_name_or_path": str(tiny / "model"), "output_dir": str(folder / "out"), **SETTINGS, **named}
    config = folder / "train.yaml"
    config.write_text(yaml.safe_dump({**settings, **keys}))
    environment = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "MASTER_PORT": str(free_port())}
    return run_client(
        [LLAMAFACTORY, "train", config], folder / "run", section=section, environment=environment, may_abort=True
    )


@pytest.mark.parametrize(
    ("stage", "data", "parts", "keys"),
    [
        pytest.param("pt", "text", 1, {}, id="pt, packed"),
        pytest.param("sft", "alpaca", 1, {}, id="sft"),
        pytest.param("sft", "alpaca", 1, {"packing": True}, id="sft, packed"),
        pytest.param("sft", "alpaca", 1, {"neat_packing": True}, id="sft, neat_packing"),
        pytest.param("dpo", "ranking", 2, {}, id="dpo"),
        pytest.param("rm", "ranking", 2, {}, id="rm"),
    ],
)
def test_rows_are_replayed_in_the_workers(
    tiny: Path, tmp_path: Path, stage: str, data: str, parts: int, keys: dict[str, Any]
) -> None:
    section = section_file(tmp_path)
    plain = train(tiny, tmp_path / "plain", stage, data, **keys)
    replayed = train(tiny, tmp_path / "replayed", stage, data, section=section, **keys)
    assert_replay(plain, replayed, parts)
    assert "stored with every row" not in replayed.printed  # of neat_packing's masks, the documents are


def test_a_resumed_run_goes_on_bit_for_bit(tiny: Path, tmp_path: Path) -> None:
    # Under DeepSpeed: without it, resuming on CPU fails in the transformers release that LLaMA-Factory pins.
    section = section_file(tmp_path)
    engine = tmp_path / "zero2.json"
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping")
    engine.write_text(json.dumps({**dict.fromkeys(keys, "auto"), "zero_optimization": {"stage": 2}}))
    saves = {"save_strategy": "steps", "save_steps": 5, "deepspeed": str(engine)}
    whole = train(tiny, tmp_path / "whole", "sft", "alpaca", section=section, **saves)
    checkpoint = tmp_path / "whole" / "out" / "checkpoint-5"
    resumed = train(
        tiny, tmp_path / "again", "sft", "alpaca", section=section, **saves, resume_from_checkpoint=str(checkpoint)
    )
    assert_same_from(whole, resumed, 5)
