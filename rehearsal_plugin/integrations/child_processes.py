"""Child processes of `rehearsal_plugin.run`, such as ranks that a script starts itself.

They inherit an environment variable with the options, and a `PYTHONPATH` that begins with the folder `startup`. Its
`sitecustomize` patches the frameworks there, too. Processes that inherit no environment are not reached.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.integrations.deepspeed import engine as deepspeed
from rehearsal_plugin.integrations.horovod import optimizer as horovod
from rehearsal_plugin.integrations.report_on_stderr import show_report

__all__ = ["hand_on", "patch_framework", "patch_inherited", "withdraw"]

OPTIONS = "REHEARSAL_PLUGIN_RUN"
STARTUP = Path(__file__).resolve().parent / "startup"


def hand_on(source: str | None) -> None:
    """Have the child processes of this one patched like it.

    Args:
        source: The file of `--rehearsal-config`; None without one.
    """
    file = source if source is None or not Path(source).exists() else str(Path(source).resolve())
    os.environ[OPTIONS] = json.dumps({"config": file, "process": os.getpid()})
    paths = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry and entry != str(STARTUP)]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(STARTUP), *paths])


def withdraw() -> None:
    """Forget what this process inherited, as it is told its own options."""
    os.environ.pop(OPTIONS, None)


def patch_inherited(framework: str) -> None:
    """Patch a framework by the options that a parent handed on; called after its import.

    Raises:
        ConfigError: The file of the parent cannot be used.
    """
    options = json.loads(os.environ.get(OPTIONS, "null"))
    if options is None or options["process"] == os.getpid():
        return
    source = options["config"]
    patch_framework(framework, None if source is None else RehearsalConfig.load(source, open_names=True))


def patch_framework(framework: str, config: RehearsalConfig | None) -> None:
    """Patch `"deepspeed"`, `"horovod"` (which needs a section) or `"transformers"`.

    Args:
        framework: It is installed.
        config: The section of jobs that bring none of their own.
    """
    show_report()
    if framework == "deepspeed":
        deepspeed.patch(fallback=config)
    elif framework == "horovod" and config is not None:
        horovod.patch(config)
    elif framework == "transformers":
        from rehearsal_plugin.integrations.transformers import callback as transformers

        transformers.patch(config)
