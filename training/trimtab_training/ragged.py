"""Rows of different lengths as plain arrays, for checkpoints."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def pack_ragged(rows: Sequence[Sequence[float]], dtype: type[np.generic]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Rows of different lengths as one flat array and the lengths."""
    flat = np.array([item for row in rows for item in row], dtype=dtype)
    return flat, np.array([len(row) for row in rows], dtype=np.int64)


def unpack_ragged(flat: NDArray[Any], lengths: NDArray[np.int64]) -> list[tuple[Any, ...]]:
    """What `pack_ragged` packed, as tuples of plain numbers."""
    ends = np.cumsum(lengths)
    items = flat.tolist()
    return [tuple(items[end - length : end]) for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)]
