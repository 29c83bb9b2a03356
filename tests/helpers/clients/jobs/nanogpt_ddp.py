"""A loop as of nanoGPT under DDP: random windows of one long text, accumulation, an evaluation every few steps."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from rehearsal_plugin import Rehearsal
from tests.helpers.clients.jobs.language import LENGTH, VOCABULARY, Batch, Note, TinyModel, next_token_loss

STEPS, PASSES, SAVED = 8, 2, 5


def get_batch(text: Tensor, generator: torch.Generator) -> Batch:
    """Four windows of the text."""
    starts = torch.randint(len(text) - LENGTH, (4,), generator=generator).tolist()
    ids = torch.stack([text[start : start + LENGTH] for start in starts])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


@torch.no_grad()
def evaluate(model: torch.nn.Module, text: Tensor, note: Note) -> None:
    model.eval()
    batch = get_batch(text, torch.Generator().manual_seed(7))
    note.evaluated(batch, next_token_loss(model(batch["input_ids"]), batch["labels"]))
    model.train()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--section", type=Path)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--resume", type=Path)
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(dist.get_rank())
    train, held_out = torch.randint(VOCABULARY, (2, 4000), generator=torch.Generator().manual_seed(1))
    model, note = TinyModel(), Note()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rehearsal = None if arguments.section is None else Rehearsal(arguments.section)
    first = 0
    if arguments.resume is not None:
        saved = torch.load(arguments.resume / f"model{dist.get_rank()}.pt")
        first = saved["step"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"])
        if rehearsal is not None:
            rehearsal.load(arguments.resume)
    parallel = DistributedDataParallel(model)
    for step in range(first, STEPS):
        if step % 4 == 0:
            evaluate(parallel, held_out, note)
        for _ in range(PASSES):
            batch = get_batch(train, generator)
            if rehearsal is not None:
                batch = rehearsal.augment(batch)
            loss = next_token_loss(parallel(batch["input_ids"]), batch["labels"])
            note.trained(batch, loss)
            (loss / PASSES).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        if rehearsal is not None:
            rehearsal.step()
        if arguments.save is not None and step + 1 == SAVED:
            arguments.save.mkdir(exist_ok=True)
            state = {"step": SAVED, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "generator": generator.get_state()}, arguments.save / f"model{dist.get_rank()}.pt")
            if rehearsal is not None:
                rehearsal.save(arguments.save)
    note.write(model, dist.get_rank())
    if rehearsal is not None:
        rehearsal.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
