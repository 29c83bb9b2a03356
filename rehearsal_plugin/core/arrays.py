"""Array types of the package, one name each."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["ByteArray", "Float32Array", "Float64Array", "IntArray", "Mask", "RankArray"]

IntArray: TypeAlias = NDArray[np.int64]
"""Slots, counts, sizes, steps and partition keys."""

RankArray: TypeAlias = NDArray[np.int32]
"""Ranks, one a row."""

Float32Array: TypeAlias = NDArray[np.float32]
"""Scores and embeddings of rows, as they are stored."""

Float64Array: TypeAlias = NDArray[np.float64]
"""Weights, losses and similarities, in the precision of calculations."""

ByteArray: TypeAlias = NDArray[np.uint8]
"""Bytes of rows."""

Mask: TypeAlias = NDArray[np.bool_]
"""Yes or no, one an element."""
