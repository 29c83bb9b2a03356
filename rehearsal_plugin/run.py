"""Run an unchanged training script with rehearsal.

    deepspeed --num_gpus 8 --module rehearsal_plugin.run train.py --deepspeed_config ds_config.json
    torchrun --nproc_per_node 8 -m rehearsal_plugin.run train.py
    horovodrun -np 8 --gloo python -m rehearsal_plugin.run --rehearsal-config rehearsal.yaml train.py

These calls of the script then attach a buffer:

- `deepspeed.initialize`, by the `rehearsal` block of its config, or else by the file of `--rehearsal-config`.
- `hvd.DistributedOptimizer`, by that file.
- The constructor of a Hugging Face `Trainer`, which gets a `RehearsalCallback`, by the block or else by the file.

DeepSpeed is imported before the script starts. So variables that it reads at its import, such as `DS_ACCELERATOR`,
belong into the environment of the launcher.
"""

from __future__ import annotations

import argparse
import importlib.util
import runpy
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.errors import MissingDependencyError
from rehearsal_plugin.integrations.deepspeed import engine as deepspeed
from rehearsal_plugin.integrations.horovod import optimizer as horovod
from rehearsal_plugin.integrations.import_hook import when_imported

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Patch the frameworks, then run the script as `python script.py args` would.

    Args:
        argv: Arguments of the command line, without the program; None takes those of this process.

    Raises:
        MissingDependencyError: None of the frameworks is installed, or a job without a file lacks DeepSpeed.
        ConfigError: The file of `--rehearsal-config` cannot be used.
    """
    options = _parser().parse_args(argv)
    source = options.rehearsal_config
    _patch_frameworks(None if source is None else RehearsalConfig.load(source, open_names=True))
    rank = [] if options.local_rank is None else [f"--local_rank={options.local_rank}"]
    _exit_on_sigterm()
    sys.argv = [options.script, *rank, *options.arguments]
    if options.module:
        runpy.run_module(options.script, run_name="__main__", alter_sys=True)
    else:
        if not getattr(sys.flags, "safe_path", False):  # with `python -P` the first entry is no folder of a script
            sys.path[0] = str(Path(options.script).resolve().parent)
        runpy.run_path(options.script, run_name="__main__")


def _patch_frameworks(config: RehearsalConfig | None) -> None:
    """Patch the frameworks that are installed."""
    frameworks = ("deepspeed", "horovod", "transformers")
    installed = {name for name in frameworks if importlib.util.find_spec(name) is not None}
    if not installed:
        raise MissingDependencyError(
            "neither DeepSpeed nor Horovod nor transformers is installed; pip install 'rehearsal_plugin[deepspeed]', "
            "or build Horovod with scripts/install_horovod.sh"
        )
    if config is None and "deepspeed" not in installed:
        raise MissingDependencyError(
            "DeepSpeed is not installed; pip install 'rehearsal_plugin[deepspeed]', or give --rehearsal-config FILE "
            "for a job without it"
        )
    if "deepspeed" in installed:
        deepspeed.patch(fallback=config)
    if config is not None and "horovod" in installed:
        horovod.patch(config)
    when_imported("transformers.trainer", lambda: _patch_trainer(config))


def _patch_trainer(config: RehearsalConfig | None) -> None:
    from rehearsal_plugin.integrations.transformers import callback as transformers

    transformers.patch(config)


def _exit_on_sigterm() -> None:
    """Have a scheduler's SIGTERM end the script as `sys.exit` does, so that `finally` blocks run.

    A script that sets its own handler replaces this one.
    """
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rehearsal_plugin.run", description=__doc__.partition("\n")[0])
    parser.add_argument("--local_rank", "--local-rank", help="passed on to the script; the deepspeed launcher adds it")
    parser.add_argument(
        "--rehearsal-config",
        metavar="FILE",
        help="the rehearsal section as JSON or YAML; jobs without DeepSpeed need it",
    )
    parser.add_argument("-m", "--module", action="store_true", help="the script is the name of a module")
    parser.add_argument("script", help="the training script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script")
    return parser


if __name__ == "__main__":
    main()
