"""Array types have one name in the whole package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import rehearsal_plugin
from rehearsal_plugin.core import arrays

PACKAGE = Path(rehearsal_plugin.__file__).parent
OTHERS = sorted(set(PACKAGE.rglob("*.py")) - {Path(arrays.__file__)})


def aliases(source: str) -> Iterator[str]:
    """Names that a module gives to array types."""
    for node in ast.parse(source).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            value = ast.unparse(node.value)
            if value.startswith(("NDArray[", "npt.NDArray[", "np.ndarray[")):
                yield ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_other_module_names_an_array_type(path: Path) -> None:
    assert list(aliases(path.read_text(encoding="utf-8"))) == []


def test_an_alias_would_be_seen() -> None:
    source = "Slots: TypeAlias = NDArray[np.int64]\nRows = NDArray[np.uint8]\ncount: int = 3\n"
    assert list(aliases(source)) == ["Slots", "Rows"]


@pytest.mark.parametrize(
    ("alias", "dtype"),
    [
        ("IntArray", np.int64),
        ("RankArray", np.int32),
        ("Float32Array", np.float32),
        ("Float64Array", np.float64),
        ("ByteArray", np.uint8),
        ("Mask", np.bool_),
    ],
)
def test_a_name_stands_for_its_dtype(alias: str, dtype: type) -> None:
    assert dtype.__name__ in str(getattr(arrays, alias))
