"""Run a training script with rehearsal, and leave the script untouched.

    deepspeed --num_gpus 8 --module rehearsal_plugin.run train.py --deepspeed_config ds_config.json
    torchrun --nproc_per_node 8 -m rehearsal_plugin.run train.py

The script's own `deepspeed.initialize` then attaches the buffer that the `rehearsal` block of its DeepSpeed
config asks for.
"""

from __future__ import annotations

import argparse
import importlib.util
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from rehearsal_plugin.errors import MissingDependencyError
from rehearsal_plugin.integrations import deepspeed

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Patch the frameworks that are installed, then run the script as `python script.py args` would."""
    options = _parser().parse_args(argv)
    if importlib.util.find_spec("deepspeed") is None:
        raise MissingDependencyError("DeepSpeed is not installed; pip install 'rehearsal_plugin[deepspeed]'")
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
