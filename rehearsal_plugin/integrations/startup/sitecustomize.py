"""Startup hook of the child processes of `rehearsal_plugin.run`, which Python imports before any script.

It imports next to nothing. A framework is patched right after the script has imported it. A `sitecustomize` of the
user, which this one hides, runs first.
"""

from __future__ import annotations

import sys
from importlib import util
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
PACKAGES = HERE.parents[2]
FRAMEWORKS = {"deepspeed": "deepspeed", "horovod.torch": "horovod", "transformers.trainer": "transformers"}


def run_next_sitecustomize() -> None:
    """Run the `sitecustomize` that Python would have found without this one."""
    others = [entry for entry in sys.path if Path(entry).resolve() != HERE]
    spec = PathFinder.find_spec("sitecustomize", others)
    if spec is not None:
        sys.modules["sitecustomize"] = execute(spec)


def execute(spec: Any) -> ModuleType:
    """The module of a spec."""
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def patch_when_imported() -> None:
    """Have each framework patched after its import; the package itself, with torch, is imported only then."""
    path = HERE.parent / "import_hook.py"
    import_hook = execute(util.spec_from_file_location("_rehearsal_plugin_import_hook", path))
    for module, framework in FRAMEWORKS.items():
        import_hook.when_imported(module, lambda framework=framework: patch(framework))


def patch(framework: str) -> None:
    """Patch a framework as the parent was told to."""
    if util.find_spec("rehearsal_plugin") is None:
        sys.path.append(str(PACKAGES))
    from rehearsal_plugin.integrations.child_processes import patch_inherited

    patch_inherited(framework)


if __name__ == "sitecustomize":
    run_next_sitecustomize()
    patch_when_imported()
