"""The Hugging Face Trainer: one callback, which keeps its buffer over several trainers.

    python -m scripts.examples.hf_trainer

prints, among the Trainer's own lines,

    without rehearsal: the model knows domain 0 no more, domain 1 well
    with rehearsal: the model knows domain 0 well, domain 1 well
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from rehearsal_plugin import RehearsalCallback

LENGTH, VOCABULARY = 16, 64


def rows_of(domain: int) -> list[dict[str, torch.Tensor]]:
    """Counting upwards in domain 0 and downwards in domain 1, from everywhere."""
    steps = torch.arange(LENGTH) * (1 if domain == 0 else -1)
    starts = torch.arange(160)[:, None]
    return [{"input_ids": row, "labels": row} for row in (starts + steps) % 60 + 2 * torch.tensor([domain])]


def train(section: dict[str, Any]) -> GPT2LMHeadModel:
    set_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=LENGTH, vocab_size=VOCABULARY))
    rehearsal = RehearsalCallback(section)
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"learning_rate": 1e-2, "num_train_epochs": 4, "per_device_train_batch_size": 16}
        quiet: dict[str, Any] = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
        for domain in range(2):
            arguments = TrainingArguments(folder, **options, **quiet)
            Trainer(model, arguments, train_dataset=rows_of(domain), callbacks=[rehearsal]).train()
    rehearsal.close()
    return model


@torch.no_grad()
def knows(model: GPT2LMHeadModel, domain: int) -> str:
    batch = {name: torch.stack([row[name] for row in rows_of(domain)]) for name in ("input_ids", "labels")}
    return "well" if model(**batch).loss < 1.5 else "no more"


def main() -> None:
    sections: dict[str, Any] = {"without": {"enabled": False}, "with": {"buffer": {"capacity": 1000}, "ratio": 0.5}}
    for name, section in sections.items():
        model = train(section)
        print(f"{name} rehearsal: the model knows domain 0 {knows(model, 0)}, domain 1 {knows(model, 1)}")


if __name__ == "__main__":
    main()
