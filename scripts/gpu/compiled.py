"""A compiled model is compiled once, with rehearsal as without, and its losses are those of the model as it is.

python -m scripts.gpu.compiled --out compiled.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rehearsal_plugin import LocalTransport, Rehearsal
from scripts.common.report import write_text
from scripts.gpu.model import GPT, Size

SIZE, ROWS, STEPS = Size(512, 128, 2, 4, 64), 8, 12


def main(argv: Sequence[str]) -> int:
    """Trains both; the exit status is 1 where they differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="file of the figures")
    arguments = parser.parse_args(argv)
    backend = "inductor" if torch.cuda.is_available() else "eager"
    plain = losses(lambda model: model)
    compiled = losses(lambda model: torch.compile(model, backend=backend))
    graphs: Any = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    furthest = max(abs(one - other) for one, other in zip(plain, compiled, strict=True))
    figures = {"graphs": float(graphs), "furthest": furthest}
    print(figures)
    write_text(arguments.out, json.dumps(figures))
    return int(furthest > 1e-2 or graphs > 2)


def losses(prepare: Callable[[GPT], Callable[..., torch.Tensor]]) -> list[float]:
    """Of a short job; batches of two sizes, before and after rows are replayed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = GPT(SIZE).to(device)
    optimizer, forward, found = torch.optim.SGD(model.parameters(), lr=0.01), prepare(model), []
    generator = torch.Generator().manual_seed(1)
    with Rehearsal({"buffer": {"capacity": 100}, "representatives": 2}, LocalTransport()) as rehearsal:
        for _ in range(STEPS):
            ids = torch.randint(SIZE.vocabulary, (ROWS, SIZE.length), generator=generator).to(device)
            loss = forward(rehearsal.update({"ids": ids})["ids"])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(loss))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
