"""Small jobs with a Hugging Face Trainer: rows with ids, a tiny GPT-2, and a callback that notes its batches."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

LENGTH, VOCABULARY, IGNORED = 12, 128, -100
FIELDS = ("input_ids", "attention_mask", "position_ids", "labels")

Row = dict[str, Tensor]


def row(number: int) -> Row:
    """Two documents packed into one row, behind a prompt that has no labels, before padding."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(4, VOCABULARY, (LENGTH,), generator=generator)
    ids[0], ids[1] = number % VOCABULARY, number // VOCABULARY
    end, boundary = LENGTH - number % 4, 3 + number % 5
    places = torch.cat((torch.arange(boundary), torch.arange(LENGTH - boundary)))
    mask = (torch.arange(LENGTH) < end).long()
    labels = torch.where(mask.bool(), ids, IGNORED)
    labels[: 1 + number % 3] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "position_ids": places, "labels": labels}


def number_of(ids: Tensor) -> int:
    return int(ids[0] + VOCABULARY * ids[1])


class Rows(Dataset[Row]):
    """Rows `first` to `first + count - 1`."""

    def __init__(self, count: int = 400, first: int = 0, domain: bool = False) -> None:
        self._count, self._first, self._domain = count, first, domain

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Row:
        made = row(self._first + index)
        return {**made, "domain": torch.tensor((self._first + index) % 3)} if self._domain else made


class BatchRecorder(TrainerCallback):
    """Notes the micro-batches that the model trains on, and the gradients of each step."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.batches: list[dict[str, Any]] = []
        self.evaluated: list[int] = []
        self.gradients: list[Tensor] = []
        self._model = model
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: torch.nn.Module, _: Any, inputs: dict[str, Any]) -> None:
        if module.training:
            self.batches.append({name: value.clone() for name, value in inputs.items() if name in FIELDS})
        else:
            self.evaluated.append(len(inputs["input_ids"]))

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        grads = [p.grad.flatten() for p in self._model.parameters() if p.grad is not None]
        if grads:
            self.gradients.append(torch.cat(grads))


def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": LENGTH, "vocab_size": VOCABULARY}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def trainer(
    folder: Path,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    data: Dataset[Row] | None = None,
    network: GPT2LMHeadModel | None = None,
    kind: type[Trainer] = Trainer,
    **arguments: Any,
) -> tuple[Trainer, BatchRecorder]:
    """A trainer, and the recorder of the batches of its model; a tiny GPT-2 without `network`."""
    network = network or model()
    recorder = BatchRecorder(network)
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 8,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
        "dataloader_pin_memory": False,
        **arguments,
    }
    job = kind(
        model=network,
        args=TrainingArguments(**settings),
        train_dataset=data or Rows(),
        eval_dataset=Rows(20, 10_000),
        callbacks=[*callbacks, recorder],
    )
    return job, recorder


def allow_indexed_cpu() -> None:
    """Have `torch.load` take `cpu:1` for `cpu`.

    Accelerate gives each rank on CPU a device with an index, and Trainers before 5.19 resume with it as `map_location`,
    which torch refuses. On GPUs the index means something, and the same line works.
    """

    def restore(storage: Any, location: str) -> Any:
        return storage if location.startswith("cpu:") else None

    torch.serialization.register_package(0, lambda _: None, restore)


def losses(job: Trainer) -> list[float]:
    return [entry["loss"] for entry in job.state.log_history if "loss" in entry]


def digest(module: Any) -> str:
    """Alike for bit-identical parameters."""
    sum_ = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        sum_.update(name.encode() + value.detach().contiguous().numpy().tobytes())
    return sum_.hexdigest()


def whole(batch: dict[str, Any]) -> list[int]:
    """The numbers of the rows of a batch, each bit for bit as it was made."""
    numbers = [number_of(ids) for ids in batch["input_ids"]]
    for place, number in enumerate(numbers):
        made = row(number)
        assert all(torch.equal(batch[name][place], made[name]) for name in FIELDS), number
    return numbers
