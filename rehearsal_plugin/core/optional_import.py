"""Imports of packages that only a part of this one needs, and the error where one is not installed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from rehearsal_plugin.errors import MissingDependencyError

__all__ = ["missing_dependency", "optional_import"]


def optional_import(module: str, *, extra: str = "", name: str = "", needed_by: str = "", hint: str = "") -> Any:
    """Import a module of an optional package, such as `pyarrow.parquet`.

    Args:
        module: Dotted name of the module.
        extra: See `missing_dependency`.
        name: Of the package in the message; the first part of `module` when left out.
        needed_by: See `missing_dependency`.
        hint: See `missing_dependency`.

    Raises:
        MissingDependencyError: The package is not installed, or cannot be loaded.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = name or module.partition(".")[0]
        raise missing_dependency(package, extra=extra, needed_by=needed_by, hint=hint) from error


def missing_dependency(package: str, *, extra: str = "", needed_by: str = "", hint: str = "") -> MissingDependencyError:
    """The error that says which package is missing and how to get it.

    Args:
        package: Name of the package.
        extra: The extra of `rehearsal_plugin` that installs it; empty where pip alone does not.
        needed_by: Subject of the message, such as the feature or file that needs the package.
        hint: Another way to get the package, or to do without it.
    """
    missing = f"{needed_by} needs {package}, which is not installed" if needed_by else f"{package} is not installed"
    ways = [f"pip install 'rehearsal_plugin[{extra}]'" if extra else "", hint]
    return MissingDependencyError(f"{missing}; {', or '.join(filter(None, ways))}")
