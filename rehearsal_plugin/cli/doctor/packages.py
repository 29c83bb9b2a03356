"""Versions of what is installed, against the bounds of the package."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import Version

import rehearsal_plugin
from rehearsal_plugin.buffer.rows.copies import COMPILED
from rehearsal_plugin.cli.doctor.finding import Finding, fine, problem, warning

__all__ = ["check_copies", "check_packages"]

NAME = "rehearsal_plugin"
FRAMEWORKS = {
    "deepspeed": "its engine",
    "horovod": "its optimizer",
    "transformers": "Trainer, and all that is built on it",
    "accelerate": "Trainer with DeepSpeed",
    "faiss-cpu": "retrieval with the indices ivf and hnsw",
    "pyarrow": "Arrow and Parquet files",
    "zstandard": ".jsonl.zst files",
}
"""Packages of the extras, and what each is for."""

BUILT = {"horovod": "build it with scripts/install_horovod.sh"}
"""Packages that pip alone does not install, and what does."""


def check_packages() -> Iterator[Finding]:
    """What is required, then the frameworks that may be attached to."""
    yield fine("versions", f"rehearsal_plugin {rehearsal_plugin.__version__} on Python {platform.python_version()}")
    try:
        listed = [Requirement(line) for line in metadata.requires(NAME) or ()]
    except metadata.PackageNotFoundError:
        yield warning(
            "versions",
            "rehearsal_plugin is on the path and not installed, so the versions that it needs are not known",
            "pip install rehearsal_plugin, or in a checkout: pip install -e .",
        )
        return
    needed = [requirement for requirement in listed if _applies(requirement)]
    yield from (_check_needed(requirement) for requirement in needed)
    for extra in metadata.metadata(NAME).get_all("Provides-Extra") or ():
        of_extra = [one for one in listed if one not in needed and _applies(one, extra) and one.name in FRAMEWORKS]
        yield from (_check_framework(one, extra) for one in of_extra if extra != "dev")


def check_copies() -> Iterator[Finding]:
    """Whether the copies of rows are compiled."""
    if COMPILED:
        yield fine("compiler", "rows are copied by compiled code")
        return
    yield warning(
        "compiler",
        "rows are copied by numpy, as the package was installed without a C compiler: the same results in more time",
        "install gcc and python3-dev, then pip install --force-reinstall --no-deps --no-binary rehearsal_plugin "
        "rehearsal_plugin",
    )


def _applies(requirement: Requirement, extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _fits(requirement: Requirement, version: str) -> bool:
    return requirement.specifier.contains(Version(version), prereleases=True)


def _check_needed(requirement: Requirement) -> Finding:
    version = _installed(requirement.name)
    if version is None:
        text = f"{requirement.name} is not installed, and the package needs {requirement.specifier}"
        return problem("versions", text, f"pip install '{_spelled(requirement)}'")
    if not _fits(requirement, version):
        text = f"{requirement.name} is {version}, and the package needs {requirement.specifier}"
        return problem("versions", text, f"pip install --upgrade '{_spelled(requirement)}'")
    return fine("versions", f"{requirement.name} {version}")


def _check_framework(requirement: Requirement, extra: str) -> Finding:
    version, use = _installed(requirement.name), FRAMEWORKS[requirement.name]
    how = BUILT.get(requirement.name, f"pip install 'rehearsal_plugin[{extra}]'")
    if version is None:
        return fine("frameworks", f"{requirement.name} is not installed; for {use}: {how}")
    if not _fits(requirement, version):
        text = f"{requirement.name} is {version}, and {use} is supported from {requirement.specifier} on"
        upgrade = f"pip install --upgrade '{_spelled(requirement)}'"
        return problem("frameworks", text, BUILT.get(requirement.name, upgrade))
    return fine("frameworks", f"{requirement.name} {version} is supported: {use}")


def _spelled(requirement: Requirement) -> str:
    return f"{requirement.name}{requirement.specifier}"
