"""The Hugging Face Trainer: jobs that end and are resumed, follow each other, or are broken off."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback

from rehearsal_plugin import RehearsalCallback
from tests.helpers.ranks import run_ranks
from tests.helpers.trainer_jobs import VOCABULARY, Rows, allow_indexed_cpu, digest, losses, trainer, whole

SECTION: dict[str, Any] = {"buffer": {"capacity": 60}, "representatives": 2, "exchange": {"timeout_s": 20}}
RECORDING = {**SECTION, "strategy": {"name": "der", "alpha": 0.5, "outputs": ["logits"]}}
NEW, ADDED = 4, 2


def resumed(folder: Path, network: Callable[[], Any] | None = None, **keys: Any) -> dict[str, Any]:
    """A job of ten steps, and one that was stopped after six and resumed by another process's trainer."""
    saving: dict[str, Any] = {"max_steps": 10, "save_strategy": "steps", "save_steps": 6, **keys}
    found: dict[str, dict[str, Any]] = {}
    for name in ("whole", "resumed"):
        callback = RehearsalCallback(None if "deepspeed" in keys else SECTION)
        job, seen = trainer(folder, callbacks=[callback], network=None if network is None else network(), **saving)
        job.train(resume_from_checkpoint=str(folder / "checkpoint-6") if name == "resumed" else None)
        assert callback.rehearsal is not None
        totals = {k: v for k, v in callback.rehearsal.metrics().items() if not k.endswith("_ms")}
        batches = [whole(batch) for batch in seen.batches[-4 * keys.get("gradient_accumulation_steps", 1) :]]
        found[name] = {
            "digest": digest(job.model),
            "buffer": callback.rehearsal.fingerprint(),
            "totals": totals,
            "batches": batches,
            "losses": losses(job)[-4:],
        }
        callback.close()
        if dist.is_initialized():
            dist.barrier()
    saved = sorted(path.name for path in (folder / "checkpoint-6").glob("rehearsal-*.safetensors"))
    return {
        "alike": found["whole"] == found["resumed"],
        "saved": saved,
        "sizes": [len(one) for one in found["resumed"]["batches"]],
    }


def resumed_on_ranks(folder: Path) -> dict[str, Any]:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # its build would take half a minute
    allow_indexed_cpu()
    engine: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
        "rehearsal": SECTION,
    }
    return {
        "ddp": resumed(folder / "ddp"),
        "ddp, two passes": resumed(folder / "ddp2", gradient_accumulation_steps=2),
        "zero": resumed(folder / "zero", deepspeed=engine, gradient_accumulation_steps=2),
        "accelerate": by_accelerate(folder / "accelerate", engine),
        "tensor parallel": resumed(  # last: the engines after it would be tensor-parallel, too
            folder / "tp", network=llama, deepspeed={**engine, "tensor_parallel": {"autotp_size": 2}}, max_grad_norm=1.0
        ),
    }


def llama() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes))


def by_accelerate(folder: Path, engine: dict[str, Any]) -> list[int]:
    """The sizes of the micro-batches of a job whose DeepSpeed config `accelerate launch` names, not its arguments."""
    folder.mkdir(exist_ok=True)
    config = folder / f"engine{dist.get_rank()}.json"
    config.write_text(json.dumps(engine))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        patch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(config))
        callback = RehearsalCallback()
        job, seen = trainer(folder, callbacks=[callback], use_cpu=False)
        job.train()
    assert job.is_deepspeed_enabled
    callback.close()
    return [len(whole(batch)) for batch in seen.batches]


@functools.cache
def resumed_ranks(folder: Path) -> list[Any]:
    return run_ranks(resumed_on_ranks, 2, folder, timeout_s=200)


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resumed")


@pytest.mark.parametrize("name", ["ddp", "ddp, two passes", "zero", "tensor parallel"])
def test_a_resumed_job_goes_on_bit_for_bit_on_two_ranks(name: str, common: Path) -> None:
    pytest.importorskip("deepspeed")
    for rank in resumed_ranks(common):
        assert rank[name]["alike"]
        assert set(rank[name]["sizes"]) == {NEW + ADDED}
        assert len(rank[name]["saved"]) == (1 if name == "tensor parallel" else 2), "one file for what peers share"


def test_a_section_in_the_deepspeed_config_of_accelerate_is_found(common: Path) -> None:
    pytest.importorskip("deepspeed")
    for rank in resumed_ranks(common):
        assert rank["accelerate"][-1] == NEW + ADDED


def test_a_resumed_job_goes_on_bit_for_bit(tmp_path: Path) -> None:
    assert resumed(tmp_path)["alike"]


def test_one_callback_keeps_its_buffer_over_several_trainers(tmp_path: Path) -> None:
    callback = RehearsalCallback({**SECTION, "buffer": {"capacity": 1000}})
    for first in (0, 1000):
        job, seen = trainer(tmp_path, callbacks=[callback], data=Rows(100, first))
        job.train()
    assert {number // 1000 for batch in seen.batches for number in whole(batch)[NEW:]} == {0, 1}
    callback.close()


# --- jobs that are broken off ----------------------------------------------------------------------------------------


class Broken(Trainer):
    """Fails once, in the second micro-batch of its third step."""

    error: BaseException | None = None
    passes = 0

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.passes += 1
        if self.error is not None and self.passes == 6:
            error, self.error = self.error, None
            raise error
        return super().training_step(*args, **kwargs)


def test_after_a_step_that_was_broken_off_another_trainer_goes_on(tmp_path: Path) -> None:
    callback = RehearsalCallback(RECORDING)
    keys: dict[str, Any] = {"callbacks": [callback], "gradient_accumulation_steps": 2}
    job, _ = trainer(tmp_path, kind=Broken, **keys)
    assert isinstance(job, Broken)
    job.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        job.train()
    other, seen = trainer(tmp_path, **keys)
    other.train()
    callback.close()
    assert other.state.global_step == 8
    assert len(whole(seen.batches[-1])) == NEW + ADDED


class Stopping(TrainerCallback):
    """Ends the first epoch within its second step."""

    substeps = 0

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.substeps += 1
        control.should_epoch_stop = self.substeps == 2


def test_an_epoch_may_end_within_a_step(tmp_path: Path) -> None:
    callback = RehearsalCallback(RECORDING)
    keys: dict[str, Any] = {"gradient_accumulation_steps": 2, "max_steps": -1, "num_train_epochs": 2}
    job, seen = trainer(tmp_path, callbacks=[callback, Stopping()], data=Rows(30), **keys)
    job.train()
    callback.close()
    assert job.state.global_step == 1 + 4
    assert len(seen.batches) == 3 + 8
    assert len(whole(seen.batches[-2])) == NEW + ADDED


def test_a_smaller_batch_is_found_where_memory_is_short(tmp_path: Path) -> None:
    callback = RehearsalCallback(RECORDING)
    keys: dict[str, Any] = {"auto_find_batch_size": True, "per_device_train_batch_size": 8}
    job, seen = trainer(tmp_path, callbacks=[callback], kind=Broken, gradient_accumulation_steps=2, **keys)
    assert isinstance(job, Broken)
    job.error = RuntimeError("CUDA out of memory.")
    job.train()
    callback.close()
    assert job.state.global_step == 8
    assert len(whole(seen.batches[0])) == 8
    assert len(whole(seen.batches[-1])) == 7 + ADDED
