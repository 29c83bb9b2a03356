"""Draws and rows on a GPU are those on the CPU, bit for bit, wherever rows are stored.

python -m scripts.gpu.identity --out identity.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rehearsal_plugin import LocalTransport, Rehearsal
from scripts.common.report import write_text

STEPS, ROWS = 60, 16
POLICIES: dict[str, dict[str, Any]] = {
    "reservoir": {"policy": "reservoir"},
    "balanced": {"policy": "balanced", "partition_by": "label"},
    "score": {"policy": "score", "score_by": "score"},
    "deduplicated": {"policy": "reservoir", "deduplicate": True},
}


def main(argv: Sequence[str]) -> int:
    """Compares every storage under every policy with the CPU; the exit status is 1 where one differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="file of the figures")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    storages = ("memory", "pinned", "cuda") if device.type == "cuda" else ("memory",)
    alike = {
        f"{policy}_{storage}": digest(block, storage, device) == digest(block, "memory", torch.device("cpu"))
        for policy, block in POLICIES.items()
        for storage in storages
    }
    print(alike)
    write_text(arguments.out, json.dumps({"alike": sum(alike.values()), "compared": len(alike)}))
    return int(not all(alike.values()))


def digest(block: dict[str, Any], storage: str, device: torch.device) -> str:
    """Of all that a model would see in a job on a device."""
    section = {"buffer": {"capacity": 200, "storage": storage, **block}, "ratio": 0.3}
    seen = hashlib.sha256()
    with Rehearsal(section, LocalTransport()) as rehearsal:
        for step in range(STEPS):
            batch = rehearsal.update({name: value.to(device) for name, value in rows_of(step).items()})
            for name in sorted(batch):
                seen.update(batch[name].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return seen.hexdigest()


def rows_of(step: int) -> dict[str, torch.Tensor]:
    """New rows of several dtypes, some of them twice."""
    generator = torch.Generator().manual_seed(step % 7)
    return {
        "x": torch.randn(ROWS, 33, generator=generator),
        "half": torch.randn(ROWS, 5, generator=generator).bfloat16(),
        "label": torch.randint(0, 5, (ROWS,), generator=generator),
        "score": torch.rand(ROWS, generator=generator),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
