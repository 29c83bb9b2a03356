"""The package imports what it declares, and no framework before it is needed.

Which of its modules may import which is said by the contracts of import-linter in `pyproject.toml`.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

PACKAGE = "rehearsal_plugin"
FOLDER = ROOT / PACKAGE

FRAMEWORKS = {"accelerate", "deepspeed", "faiss", "horovod", "lightning", "pyarrow", "tokenizers", "transformers"}
OPTIONAL = FRAMEWORKS | {"matplotlib", "scipy"}
REQUIRED = {"torch", "numpy", "optree", "pydantic", "safetensors", "yaml"}
OF_COMMANDS = {"typer", "rich", "packaging"}
"""Dependencies that only `rehearsal_plugin.cli` imports."""
PARTS_OF_PYDANTIC = {"annotated_types", "pydantic_core"}

MODULES = sorted((*FOLDER.rglob("*.py"), *FOLDER.rglob("*.pyi")))


def dotted(path: Path) -> str:
    """The name under which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def wing(path: Path) -> str:
    """The part of the package that a file belongs to: a folder, or a module beside the folders."""
    return path.relative_to(FOLDER).with_suffix("").parts[0]


def imported_at_once(path: Path) -> Iterator[str]:
    """Roots of what a file imports when it is loaded; what a function imports is not among them."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield PACKAGE if node.level else (node.module or "").partition(".")[0]


def loaded_by(code: str) -> set[str]:
    """Roots of all modules that are loaded after `code` ran in an interpreter of its own."""
    script = f"{code}\nimport sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_the_package_needs_nothing_beyond_its_dependencies() -> None:
    requirements = f"import {', '.join(sorted(REQUIRED))}"
    added = loaded_by(f"{requirements}; import {PACKAGE}") - loaded_by(requirements)
    named = {name for name in added if not name.startswith("_")}  # the others are made up by compiled modules
    assert named - sys.stdlib_module_names - PARTS_OF_PYDANTIC == {PACKAGE}


def test_no_module_outside_the_integrations_loads_an_optional_package() -> None:
    names = [dotted(path) for path in MODULES if path.suffix == ".py" and wing(path) != "integrations"]
    code = "; ".join(f"import {name}" for name in names if not name.endswith("__main__"))
    assert loaded_by(code) & OPTIONAL <= loaded_by("import torch, typer") & OPTIONAL


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_a_module_imports_only_declared_packages_when_it_is_loaded(path: Path) -> None:
    allowed = REQUIRED | PARTS_OF_PYDANTIC | {PACKAGE}
    allowed |= {"cli": OF_COMMANDS, "integrations": FRAMEWORKS}.get(wing(path), set())
    assert set(imported_at_once(path)) - sys.stdlib_module_names <= allowed


@pytest.mark.parametrize(
    ("code", "roots"),
    [
        ("import torch.nn", ["torch"]),
        ("import numpy, yaml as y", ["numpy", "yaml"]),
        ("from torch.nn import functional", ["torch"]),
        ("from . import fifo", [PACKAGE]),
        ("from ..rows import RowLayout", [PACKAGE]),
        ("def f():\n    import faiss", []),
    ],
)
def test_every_way_to_import_is_seen(code: str, roots: list[str], tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(code)
    assert list(imported_at_once(path)) == roots
