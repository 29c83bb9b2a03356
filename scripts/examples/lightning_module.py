"""Lightning: three short methods in your module.

    python -m scripts.examples.lightning_module

prints, among Lightning's own lines,

    rehearsal: 100 % of the first task, 100 % of the second
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from rehearsal_plugin import Rehearsal
from scripts.common.two_tasks import STEPS, TASKS, batch_of, make_model, percent_right


class Classifier(lightning.LightningModule):  # type: ignore[misc]
    """Trains on its own rows, and on those of earlier tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = make_model()

    def on_fit_start(self) -> None:  # once the ranks are connected, so that all of them share one buffer
        self.rehearsal = Rehearsal({"buffer": {"capacity": 200}, "ratio": 0.25})

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        batch = self.rehearsal.augment(batch)
        return cross_entropy(self.scores(batch["points"]), batch["labels"])

    def on_before_zero_grad(self, optimizer: Any) -> None:  # once an optimizer step
        if self.rehearsal.fed:
            self.rehearsal.step()

    def on_fit_end(self) -> None:
        self.rehearsal.close()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def main() -> None:
    model = Classifier()
    batches: Any = [batch_of(step // STEPS, step) for step in range(TASKS * STEPS)]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", devices=1, **quiet)
    trainer.fit(model, DataLoader(batches, batch_size=None))
    first, second = (percent_right(model.scores, task) for task in range(TASKS))
    print(f"rehearsal: {first} of the first task, {second} of the second")


if __name__ == "__main__":
    main()
