"""The Hugging Face Trainer with a reporter: what a change of the data does to replayed rows, in TensorBoard or W&B.

    python -m scripts.examples.reporters

prints, among the Trainer's own lines,

    loss_replayed/0 rises when the data changes, and falls again

`python -m scripts.examples.reporters tensorboard` writes it to `out/reporters` as well. Other reporters are `wandb`
(with `WANDB_MODE=offline` it needs no account) and `trackio`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from rehearsal_plugin import RehearsalCallback

LENGTH, STEPS = 16, 100
"""Tokens of a row; steps on each of two domains."""
SECTION: dict[str, Any] = {
    "buffer": {"capacity": 1000, "partition_by": "domain"},
    "hidden": ["domain"],
    "ratio": 0.25,
    "mode": "replace",
    "losses_every": 1,
}


def rows_of(domain: int) -> list[dict[str, torch.Tensor]]:
    """Counting upwards in domain 0 and downwards in domain 1."""
    steps = torch.arange(LENGTH) * (1 if domain == 0 else -1)
    tokens = (torch.arange(8 * STEPS)[:, None] + steps) % 60 + 2 * domain
    return 2 * [{"input_ids": row, "labels": row, "domain": torch.tensor(domain)} for row in tokens]


def main(reporters: list[str]) -> None:
    set_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=LENGTH, vocab_size=64))
    options: dict[str, Any] = {"learning_rate": 1e-2, "per_device_train_batch_size": 16, "num_train_epochs": 1}
    options |= {"train_sampling_strategy": "sequential", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments("out/reporters", **options, logging_steps=4, report_to=reporters)
    rehearsal = RehearsalCallback(SECTION)
    trainer = Trainer(model, arguments, train_dataset=rows_of(0) + rows_of(1), callbacks=[rehearsal])
    trainer.train()
    rehearsal.close()
    name = "rehearsal/loss_replayed/0"
    losses = {line["step"]: line[name] for line in trainer.state.log_history if name in line}
    after = max(loss for step, loss in losses.items() if step > STEPS)
    if after > 2 * losses[STEPS] and losses[2 * STEPS] < after / 2:
        print("loss_replayed/0 rises when the data changes, and falls again")


if __name__ == "__main__":
    main(sys.argv[1:])
