"""Commands of TRL's own program for two ranks on CPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.helpers.clients.tiny_llm import LONGEST, PAD

__all__ = ["ONE_TOKEN_KINDS", "TRL", "command", "deepspeed_ranks", "plain_ranks"]

TRL = Path(sys.executable).parent / "trl"
ONE_TOKEN_KINDS = {"input_ids": PAD, "attention_mask": 0, "labels": -100}
OPTIONS = (
    "--max_steps 8 --per_device_train_batch_size 4 --per_device_eval_batch_size 4 --learning_rate 1e-3 "
    "--logging_steps 1 --report_to none --save_strategy no --bf16 False --gradient_checkpointing False "
    "--eval_on_start --eval_strategy steps --eval_steps 4 --disable_tqdm True --use_cpu"
)


def command(stage: str, data: Path, model: Path, options: Sequence[object]) -> list[object]:
    """`trl <stage>` with a folder of data, for 8 steps of 4 examples."""
    named = ["--model_name_or_path", model, "--dataset_name", data, "--max_length", LONGEST]
    return [TRL, stage, *named, *OPTIONS.split(), *options]


def plain_ranks() -> list[str]:
    """Options of Accelerate that TRL hands on: two ranks, without DeepSpeed."""
    return ["--multi_gpu", "--num_processes", "2"]


def deepspeed_ranks(folder: Path, stage: int) -> list[object]:
    """The same for two ranks under DeepSpeed, with a config file in `folder`."""
    config = folder / f"zero{stage}.json"
    section = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto"}
    config.write_text(json.dumps({**section, "zero_optimization": {"stage": stage}}))
    return ["--use_deepspeed", "--num_processes", "2", "--deepspeed_config_file", config]
