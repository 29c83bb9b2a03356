"""A script that starts its ranks itself: by `torch.multiprocessing`, by `torchrun`, or by `torchrun` and our `run`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from torch import multiprocessing

HERE = Path(__file__).resolve().parent
RUN = ["-m", "rehearsal_plugin.run"]


def work(rank: int, port: str, arguments: list[str]) -> None:
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ.update(place, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    sys.argv = [str(HERE / "train.py"), *arguments]
    sys.path.insert(0, str(HERE))
    from train import main  # type: ignore[import-not-found]

    main()


if __name__ == "__main__":
    how, port, *arguments = sys.argv[1:]
    if how == "spawn":
        multiprocessing.spawn(work, args=(port, arguments), nprocs=2)  # type: ignore[attr-defined, no-untyped-call]
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
        script = [*(RUN if how == "torchrun run" else []), str(HERE / "train.py"), *arguments]
        sys.exit(subprocess.run([*command, *script], check=False).returncode)
