"""An elastic Horovod job that survives the loss of a rank and takes in new ones; it notes what it saw.

Started as it is, or with `--attach FILE` as a script that gives its state the rehearsal itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
from torch import Tensor, nn

COMMIT_EVERY = 4
SIZE = 6


class Model(nn.Module):
    """Notes the ids of the rows of a pass; the label of a row follows from its id."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 5)
        self.seen: list[int] = []
        self.whole = True

    def forward(self, x: Tensor, id: Tensor, label: Tensor) -> Tensor:
        self.seen = id.tolist()
        self.whole &= torch.equal(label, id % 5) and torch.equal(x, torch.stack((id, -id), 1).float())
        return nn.functional.cross_entropy(self.linear(x / 1e13), label)


def batch(worker: int, number: int) -> dict[str, Tensor]:
    id = torch.arange(SIZE) + 100 * number + 1_000_000 * worker
    return {"x": torch.stack((id, -id), 1).float(), "id": id, "label": id % 5}


def stored(optimizer: Any) -> list[Any]:
    """This rank's rows in the order of their slots: their ids, and a digest of all their bytes."""
    handle = getattr(optimizer, "rehearsal", None)
    buffer = None if handle is None or handle.rehearsal is None else handle.rehearsal.buffer
    if buffer is None:
        return []
    rows = torch.empty((len(buffer), buffer.layout.row_bytes), dtype=torch.uint8)
    buffer.read(torch.arange(len(buffer)).numpy(), rows)
    return [buffer.layout.unpack(rows)["id"].tolist(), hashlib.sha256(rows.numpy().tobytes()).hexdigest()]


class Notes:
    """Lines of JSON, one file a process."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / f"{os.getpid()}.jsonl").open("a", buffering=1)

    def write(self, what: str, **values: Any) -> None:
        self._file.write(json.dumps({"what": what, "time": time.time(), "pid": os.getpid(), **values}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--attach")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--kill", type=int, help="step at which rank 1 is killed")
    parser.add_argument("--want", type=int, required=True, help="ranks of the end; it waits for them")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    notes = Notes(arguments.out)
    hvd.init()
    model = Model()
    plain = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = hvd.DistributedOptimizer(plain, named_parameters=model.named_parameters())
    extra: dict[str, Any] = {}
    if arguments.attach:
        import rehearsal_plugin

        extra["rehearsal"] = rehearsal_plugin.attach(optimizer, arguments.attach, model=model)
    state = hvd.elastic.TorchState(model=model, optimizer=optimizer, step=0, settled=0, **extra)
    number = 0  # of this process's batches, not rolled back

    @hvd.elastic.run  # type: ignore[untyped-decorator]  # Horovod has no types
    def train(state: Any) -> None:
        nonlocal number
        notes.write("enter", step=state.step, rank=hvd.rank(), size=hvd.size(), stored=stored(optimizer))
        while state.settled < arguments.steps:
            model(**batch(os.getpid(), number)).backward()
            number += 1
            optimizer.step()
            optimizer.zero_grad()
            state.step += 1
            state.settled = state.settled + 1 if hvd.size() == arguments.want and passed(arguments) else 0
            notes.write("step", step=state.step, rank=hvd.rank(), size=hvd.size(), seen=model.seen, whole=model.whole)
            if state.step == arguments.kill and hvd.rank() == 1 and not (arguments.out / "killed").exists():
                (arguments.out / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.02)
            if state.step % COMMIT_EVERY == 0:
                state.save()
                notes.write("commit", step=state.step, stored=stored(optimizer))
                state.check_host_updates()

    train(state)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    alike = hvd.allgather(weights[None], name="weights")
    notes.write("end", identical=bool((alike == alike[0]).all()), step=state.step)


def passed(arguments: argparse.Namespace) -> bool:
    """Whether what the test does to the job has begun; steps before do not count."""
    return Path(arguments.out, "killed" if arguments.kill else "changed").exists()


if __name__ == "__main__":
    main()
