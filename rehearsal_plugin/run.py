"""Run an unchanged training script with rehearsal.

    deepspeed --num_gpus 8 --module rehearsal_plugin.run train.py --deepspeed_config ds_config.json
    torchrun --nproc_per_node 8 -m rehearsal_plugin.run train.py
    horovodrun -np 8 --gloo python -m rehearsal_plugin.run --rehearsal-config rehearsal.yaml train.py
    python -m rehearsal_plugin.run --rehearsal-config rehearsal.yaml trl sft --model_name_or_path ...

These calls of the script then attach a buffer:

- `deepspeed.initialize`, by the `rehearsal` block of its config, or else by the file of `--rehearsal-config`.
- `hvd.DistributedOptimizer`, by that file.
- The constructor of a Hugging Face `Trainer`, which gets a `RehearsalCallback`, by the block or else by the file.

So do Python processes that the script starts, unless `--no-children` is given. At its end, a script that attached no
buffer anywhere is told so on stderr; with `--strict` it then ends with exit status 3.

DeepSpeed is imported before the script starts. So variables that it reads at its import, such as `DS_ACCELERATOR`,
belong into the environment of the launcher.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.core.attached import FOLDER, note_attached
from rehearsal_plugin.errors import MissingDependencyError
from rehearsal_plugin.integrations.child_processes import hand_on, patch_framework, withdraw
from rehearsal_plugin.integrations.import_hook import when_imported

__all__ = ["main"]

NOTHING_ATTACHED = 3
"""Exit status with `--strict`, of a script that attached no buffer."""


def main(argv: Sequence[str] | None = None) -> None:
    """Patch the frameworks, then run the script as `python script.py args` would.

    Args:
        argv: Arguments of the command line, without the program; None takes those of this process.

    Raises:
        SystemExit: The options or the script cannot be used.
        MissingDependencyError: None of the frameworks is installed, or a job without a file lacks DeepSpeed.
        ConfigError: The file of `--rehearsal-config` cannot be used.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    if not options.module:
        options.script = _script_or_program(options.script, parser)
    source = options.rehearsal_config
    withdraw()
    _patch_frameworks(None if source is None else RehearsalConfig.load(source, open_names=True))
    if options.children:
        hand_on(source)
    _exit_on_sigterm()
    _run_and_report(options)


def _run_and_report(options: argparse.Namespace) -> None:
    """Run the script, and say at its end if no process of it had a rehearsal."""
    owner, outer, folder = os.getpid(), os.environ.get(FOLDER), tempfile.mkdtemp(prefix="rehearsal-run-")
    os.environ[FOLDER] = folder
    status: object = None
    try:
        _run_script(options)
    except SystemExit as end:
        status = end.code
    finally:
        attached = os.getpid() != owner or any(Path(folder).iterdir())  # a fork that leaves here reports nothing
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)
    if not attached:
        print(_nothing_attached(options.script), file=sys.stderr, flush=True)
        status = status or (NOTHING_ATTACHED if options.strict else status)
    elif outer is not None and os.getpid() == owner:
        os.environ[FOLDER] = outer
        note_attached()
    if status is not None:
        raise SystemExit(status)


def _nothing_attached(script: str) -> str:
    return (
        f"rehearsal_plugin.run: nothing was attached; {script} trained without replay, if it trained. It made no "
        "DeepSpeed engine, hvd.DistributedOptimizer or Trainer that has a rehearsal section (in its DeepSpeed config, "
        "or by --rehearsal-config FILE), or the section says enabled: false"
    )


def _run_script(options: argparse.Namespace) -> None:
    rank = [] if options.local_rank is None else [f"--local_rank={options.local_rank}"]
    sys.argv = [options.script, *rank, *options.arguments]
    if options.module:
        runpy.run_module(options.script, run_name="__main__", alter_sys=True)
    else:
        if not getattr(sys.flags, "safe_path", False):  # with `python -P` the first entry is no folder of a script
            sys.path[0] = str(Path(options.script).resolve().parent)
        runpy.run_path(options.script, run_name="__main__")


def _script_or_program(name: str, parser: argparse.ArgumentParser) -> str:
    """The script `name`, or else the program of that name in `PATH`; first the one beside this interpreter."""
    if Path(name).is_file() or Path(name, "__main__.py").is_file():
        return name
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    program = None if os.sep in name else shutil.which(name, path=os.pathsep.join(folders))
    if program is None:
        parser.error(f"there is no script '{name}', and no program of that name in PATH")
    return program


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
    for framework in sorted(installed - {"transformers"}):
        patch_framework(framework, config)
    when_imported("transformers.trainer", lambda: patch_framework("transformers", config))


def _exit_on_sigterm() -> None:
    """Have a scheduler's SIGTERM end the script as `sys.exit` does, so that `finally` blocks run.

    A script that sets its own handler replaces this one.
    """
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def _parser() -> argparse.ArgumentParser:
    title, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m rehearsal_plugin.run",
        description=title,
        epilog="examples:\n" + rest.partition("These calls")[0].strip("\n"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--local_rank", "--local-rank", help="passed on to the script; the deepspeed launcher adds it")
    parser.add_argument(
        "--rehearsal-config",
        metavar="FILE",
        help="the rehearsal section as JSON or YAML; jobs without DeepSpeed need it",
    )
    parser.add_argument(
        "--no-children",
        dest="children",
        action="store_false",
        help="leave Python processes that the script starts alone",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help=f"exit with status {NOTHING_ATTACHED} where the script ends without a buffer in any of its processes",
    )
    parser.add_argument("-m", "--module", action="store_true", help="the script is the name of a module")
    parser.add_argument("script", help="the training script, or a Python program in PATH such as trl")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script")
    return parser


if __name__ == "__main__":
    main()
