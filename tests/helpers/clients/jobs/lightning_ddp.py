"""A Lightning Trainer under DDP whose module calls the plugin."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from rehearsal_plugin import Rehearsal
from tests.helpers.clients.jobs.language import Batch, Note, Rows, TinyModel, next_token_loss


class Module(lightning.LightningModule):  # type: ignore[misc]
    """A model with a rehearsal from `on_fit_start` on, once the ranks are connected."""

    def __init__(self, section: Path | None) -> None:
        super().__init__()
        self.model, self.note = TinyModel(), Note()
        self._section = section
        self._rehearsal: Rehearsal | None = None
        self._resume: Path | None = None

    def on_fit_start(self) -> None:
        if self._section is not None:
            self._rehearsal = Rehearsal(self._section)
        if self._rehearsal is not None and self._resume is not None:
            self._rehearsal.load(self._resume)

    def training_step(self, batch: Batch, _: int) -> Tensor:
        if self._rehearsal is not None:
            batch = self._rehearsal.augment(batch)
        loss = next_token_loss(self.model(batch["input_ids"]), batch["labels"])
        self.note.trained(batch, loss)
        return loss

    def on_before_zero_grad(self, optimizer: Any) -> None:
        if self._rehearsal is not None and self._rehearsal.fed:
            self._rehearsal.step()

    def validation_step(self, batch: Batch, _: int) -> None:
        self.note.evaluated(batch, next_token_loss(self.model(batch["input_ids"]), batch["labels"]))

    def save_rehearsal(self, folder: Path) -> None:
        if self._rehearsal is not None:
            self._rehearsal.save(folder)

    def resume_rehearsal(self, folder: Path) -> None:
        self._resume = folder

    def on_fit_end(self) -> None:
        if self._rehearsal is not None:
            self._rehearsal.close()

    def train_dataloader(self) -> DataLoader[Batch]:
        # Unshuffled: Lightning shuffles the epoch after a resumed one as if it were the next but one.
        return self._loader(Rows(0, 40))  # five batches a rank

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader(Rows(1000, 16))

    def _loader(self, rows: Rows) -> DataLoader[Batch]:
        ranks: Any = DistributedSampler(rows, self.trainer.world_size, self.trainer.global_rank, shuffle=False)
        return DataLoader(rows, batch_size=4, sampler=ranks)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class SaveBeside(lightning.Callback):  # type: ignore[misc]
    """Saves model and rehearsal after an epoch: Lightning resumes from the middle of one at its first batch."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 0:
            module.save_rehearsal(self._folder)
            trainer.save_checkpoint(self._folder / "model.ckpt")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--section", type=Path)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--resume", type=Path)
    arguments = parser.parse_args()
    module = Module(arguments.section)
    if arguments.resume is not None:
        module.resume_rehearsal(arguments.resume)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=8,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        callbacks=[] if arguments.save is None else [SaveBeside(arguments.save)],
    )
    trainer.fit(
        module,
        ckpt_path=None if arguments.resume is None else str(arguments.resume / "model.ckpt"),
        weights_only=False,
    )
    module.note.write(module.model, trainer.global_rank)


if __name__ == "__main__":
    main()
