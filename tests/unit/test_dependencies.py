"""Each module of the package imports only modules above it, and the package only what it says it needs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "rehearsal_plugin"
FOLDER = Path(__file__).resolve().parents[1] / PACKAGE

# A module may import those above it. A folder is one layer, and its parts may import each other.
LAYERS = [
    "errors",
    "config",
    "rng",
    "shares",
    "copies",
    "losses",
    "values",
    "nesting",
    "hidden_states",
    "fields",
    "memory",
    "rows",
    "padding",
    "strategies",
    "storage",
    "occupancy",
    "policies",
    "sampling",
    "mixture",
    "journal",
    "duplicates",
    "traits",
    "provenance",
    "buffer",
    "nearest",
    "census",
    "schedule",
    "guard",
    "transport",
    "metrics",
    "evaluation",
    "pool",
    "stream",
    "worker",
    "neighbours",
    "exchange",
    "pipeline",
    "representatives",
    "supply",
    "micro_batch",
    "importance",
    "measuring",
    "answers",
    "batches",
    "checkpoint",
    "seeding",
    "rehearsal",
    "planning",
    "integrations",
    "retrieval",
    "cli",
    "run",
    "__init__",
]

OPTIONAL = ["accelerate", "deepspeed", "faiss", "horovod", "matplotlib", "scipy", "transformers"]
REQUIRED = {"torch", "numpy", "pydantic", "safetensors", "yaml"}
PARTS_OF_PYDANTIC = {"annotated_types", "pydantic_core"}

MODULES = sorted((*FOLDER.rglob("*.py"), *FOLDER.rglob("*.pyi")))


def imported(path: Path) -> Iterator[str]:
    """Dotted names of everything that a file imports, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = absolute(node, path)
            yield from (f"{source}.{alias.name}" for alias in node.names)


def absolute(node: ast.ImportFrom, path: Path) -> str:
    """The module that is imported from, with relative dots resolved."""
    if not node.level:
        return node.module or ""
    package = path.relative_to(FOLDER.parent).parts[: -node.level]
    return ".".join((*package, *filter(None, [node.module])))


def layer_of(name: str) -> str:
    """The layer of a dotted name within the package: its first part, or `__init__` for what the package exports."""
    part = name.split(".")[1] if "." in name else "__init__"
    return part if (FOLDER / part).is_dir() or any(FOLDER.glob(f"{part}.py*")) else "__init__"


def own_layer(path: Path) -> str:
    return path.relative_to(FOLDER).with_suffix("").parts[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_a_module_imports_only_layers_above_it(path: Path) -> None:
    own = own_layer(path)
    used = {layer_of(name) for name in imported(path) if name.split(".")[0] == PACKAGE} - {own}
    below = [layer for layer in used if LAYERS.index(layer) > LAYERS.index(own)]
    assert below == [], f"{path.name} is part of '{own}' and imports {below} from below it"


def test_every_module_has_its_layer() -> None:
    assert {own_layer(path) for path in MODULES} <= set(LAYERS)


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("import rehearsal_plugin.buffer", ["rehearsal_plugin.buffer"]),
        ("from rehearsal_plugin import buffer, rows", ["rehearsal_plugin.buffer", "rehearsal_plugin.rows"]),
        ("def f():\n    from rehearsal_plugin.rows import RowLayout", ["rehearsal_plugin.rows.RowLayout"]),
        ("if TYPE_CHECKING:\n    import rehearsal_plugin.rows as r", ["rehearsal_plugin.rows"]),
        ("from . import fifo", ["rehearsal_plugin.policies.fifo"]),
        ("from .base import Policy", ["rehearsal_plugin.policies.base.Policy"]),
        ("from .. import rows", ["rehearsal_plugin.rows"]),
        ("from ..rows import RowLayout", ["rehearsal_plugin.rows.RowLayout"]),
    ],
)
def test_every_way_to_import_is_seen(
    code: str, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "FOLDER", tmp_path / PACKAGE)
    path = tmp_path / PACKAGE / "policies" / "reservoir.py"
    path.parent.mkdir(parents=True)
    path.write_text(code)
    assert list(imported(path)) == names


def test_the_package_imports_no_framework() -> None:
    assert loaded_by(f"import {PACKAGE}") & set(OPTIONAL) == set()


def test_the_package_needs_nothing_beyond_its_dependencies() -> None:
    requirements = f"import {', '.join(sorted(REQUIRED))}"
    added = loaded_by(f"{requirements}; import {PACKAGE}") - loaded_by(requirements)
    named = {name for name in added if not name.startswith("_")}  # the others are made up by compiled modules
    assert named - sys.stdlib_module_names - PARTS_OF_PYDANTIC == {PACKAGE}


def test_no_module_imports_an_undeclared_package_when_it_is_loaded() -> None:
    roots = {name.split(".")[0] for path in MODULES if eager(path) for name in top_level(path)}
    assert roots - sys.stdlib_module_names <= REQUIRED | PARTS_OF_PYDANTIC | {PACKAGE}


def eager(path: Path) -> bool:
    """Whether `import rehearsal_plugin` loads the file, and not only a user of its framework."""
    return own_layer(path) not in {"integrations", "retrieval", "strategies", "cli", "run"}


def top_level(path: Path) -> Iterator[str]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield absolute(node, path)


def loaded_by(code: str) -> set[str]:
    """Roots of all modules that are loaded after `code` ran in an interpreter of its own."""
    script = f"{code}\nimport sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())
