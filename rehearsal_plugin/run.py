"""Run a training script with rehearsal, and leave the script untouched.

    deepspeed --num_gpus 8 --module rehearsal_plugin.run train.py --deepspeed_config ds_config.json
    torchrun --nproc_per_node 8 -m rehearsal_plugin.run train.py

The script's own `deepspeed.initialize` then attaches the buffer that the `rehearsal` block of its DeepSpeed
config asks for. DeepSpeed is imported before the script starts, so variables that it reads at its import, such
as `DS_ACCELERATOR`, belong into the environment of the launcher.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from rehearsal_plugin.integrations import deepspeed

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Make `deepspeed.initialize` attach, then run the script as `python script.py args` would.

    Args:
        argv: Arguments of the command line, without the program; None takes those of this process.

    Raises:
        MissingDependencyError: DeepSpeed is not installed.
    """
    options = _parser().parse_args(argv)
    deepspeed.patch()
    rank = [] if options.local_rank is None else [f"--local_rank={options.local_rank}"]
    sys.argv = [options.script, *rank, *options.arguments]
    if options.module:
        runpy.run_module(options.script, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(options.script).resolve().parent)
        runpy.run_path(options.script, run_name="__main__")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rehearsal_plugin.run", description=__doc__.partition("\n")[0])
    parser.add_argument("--local_rank", "--local-rank", help="passed on to the script; the deepspeed launcher adds it")
    parser.add_argument("-m", "--module", action="store_true", help="the script is the name of a module")
    parser.add_argument("script", help="the training script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script")
    return parser


if __name__ == "__main__":
    main()
