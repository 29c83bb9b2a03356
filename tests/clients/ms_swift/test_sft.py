"""`swift` on two ranks that it starts itself, begun by `python -m rehearsal_plugin.run`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("swift")

from scripts.common.launch import free_port
from tests.helpers.clients.claims import assert_replay, assert_same_from
from tests.helpers.clients.runs import Run, run_client, section_file
from tests.helpers.clients.tiny_llm import LONGEST

pytestmark = pytest.mark.clients

SWIFT = Path(sys.executable).parent / "swift"
OPTIONS = (
    f"--model_type llama --template chatml --torch_dtype float32 --attn_impl sdpa --max_length {LONGEST} "
    "--max_steps 8 --gradient_accumulation_steps 1 --per_device_train_batch_size 4 --per_device_eval_batch_size 4 "
    "--learning_rate 1e-3 --logging_steps 1 --save_strategy no --report_to none --eval_on_start true --eval_steps 4 "
    "--gradient_checkpointing false --use_cpu true --ddp_backend gloo --add_version false --check_model false"
)


def run_swift(
    tiny: Path, folder: Path, method: str, data: str, options: Sequence[object], section: Path | None = None
) -> Run:
    """Run a method of `swift`, which starts `torchrun`, for 8 steps of 4 examples."""
    files = ["--model", tiny / "model", "--dataset", tiny / data / "train.jsonl"]
    files += ["--val_dataset", tiny / data / "test.jsonl", "--output_dir", folder / "out"]
    environment = {"NPROC_PER_NODE": "2", "MASTER_PORT": str(free_port()), "MODELSCOPE_CACHE": str(folder / "cache")}
    given = [SWIFT, method, *files, *OPTIONS.split(), *options]
    return run_client(given, folder / "run", section=section, environment=environment, may_abort=True)


@pytest.mark.parametrize(
    ("method", "data", "options", "parts", "passes"),
    [
        pytest.param("sft", "chat", ["--tuner_type", "full"], 1, 1, id="sft"),
        pytest.param(
            "sft",
            "chat",
            ["--tuner_type", "lora", "--gradient_accumulation_steps", "2"],
            1,
            2,
            id="sft, LoRA, accumulation",
        ),
        pytest.param("rlhf", "swift_pairs", ["--rlhf_type", "dpo", "--tuner_type", "full"], 2, 1, id="dpo"),
    ],
)
def test_rows_are_replayed_in_the_workers(
    tiny: Path, tmp_path: Path, method: str, data: str, options: list[str], parts: int, passes: int
) -> None:
    section = section_file(tmp_path)
    plain = run_swift(tiny, tmp_path / "plain", method, data, options)
    replayed = run_swift(tiny, tmp_path / "replayed", method, data, options, section)
    assert_replay(plain, replayed, parts, passes)


def test_a_resumed_run_goes_on_bit_for_bit(tiny: Path, tmp_path: Path) -> None:
    section = section_file(tmp_path)
    saves = ["--tuner_type", "full", "--save_strategy", "steps", "--save_steps", "5"]
    whole = run_swift(tiny, tmp_path / "whole", "sft", "chat", saves, section)
    checkpoint = tmp_path / "whole" / "out" / "checkpoint-5"
    again = [*saves, "--resume_from_checkpoint", checkpoint]
    assert_same_from(whole, run_swift(tiny, tmp_path / "again", "sft", "chat", again, section), 5)


def test_packing_asks_for_flash_attention(tiny: Path, tmp_path: Path) -> None:
    files = ["--model", tiny / "model", "--dataset", tiny / "chat" / "train.jsonl", "--output_dir", tmp_path / "out"]
    given = [SWIFT, "sft", *files, *OPTIONS.split(), "--packing", "true"]
    run = run_client(given, tmp_path / "run", section=section_file(tmp_path), ranks=0)
    assert run.status != 0
    assert 'The "packing" feature requires a flash attention implementation' in run.printed
