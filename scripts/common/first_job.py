"""A job of the installed package, whatever it was installed from; `python first_job.py compiled|numpy`.

It ends with a message where the copies are not of that kind, or the rows not those of every other installation.
"""

from __future__ import annotations

import hashlib
import sys

import torch

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.buffer.rows.copies import COMPILED

EXPECTED = "7549dbbe646f332ac21cb49e83df9a482e968ccde11634ddce85a92985679aa5"
SECTIONS: tuple[dict[str, object], ...] = ({}, {"padding": {"length": 40, "token_id": 0}})


def main() -> None:
    kind = "compiled" if COMPILED else "numpy"
    if sys.argv[1:] != [kind]:
        sys.exit(f"the copies are {kind}, and {sys.argv[1:]} was expected")
    digest = hashlib.sha256()
    for section in SECTIONS:
        with Rehearsal({"buffer": {"capacity": 30}, "ratio": 0.25, **section}) as rehearsal:
            for step in range(40):
                width = 3 + step % 17 if section else 9
                ids = torch.arange(12 * width).view(12, width) + step
                batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
                for value in rehearsal.update(batch).values():
                    digest.update(value.numpy().tobytes())
    if digest.hexdigest() != EXPECTED:
        sys.exit(f"the rows have the digest {digest.hexdigest()}, and those of other installations {EXPECTED}")
    print(f"{kind} copies: the rows are those of every installation")


if __name__ == "__main__":
    main()
