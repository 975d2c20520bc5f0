"""Checks a safetensors file without loading it as a model: header, layout, and that every number is finite.

The format is an 8-byte little-endian header length, a JSON header and the tensors' bytes
(https://huggingface.co/docs/safetensors, "Format"). Bytes are read through a memory map in chunks, so a check needs
little memory whatever the file's size.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trimtab_adapters.contract.errors import WeightsError

MAX_HEADER_BYTES = 100_000_000
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class _NumberFormat:
    """How a type's NaN and infinite values look.

    Attributes:
        bits: Width of one number.
        exponent: Bits that are all set in every NaN and infinity; 0 for types that have neither.
        is_nan_only: Only the exact pattern `exponent` (without the sign) is NaN, and there is no infinity.
    """

    bits: int
    exponent: int = 0
    is_nan_only: bool = False


_FORMATS = {
    "F64": _NumberFormat(64, 0x7FF0_0000_0000_0000),
    "F32": _NumberFormat(32, 0x7F80_0000),
    "F16": _NumberFormat(16, 0x7C00),
    "BF16": _NumberFormat(16, 0x7F80),
    "F8_E5M2": _NumberFormat(8, 0x7C),
    "F8_E4M3": _NumberFormat(8, 0x7F, is_nan_only=True),
    **{name: _NumberFormat(64) for name in ("I64", "U64")},
    **{name: _NumberFormat(32) for name in ("I32", "U32")},
    **{name: _NumberFormat(16) for name in ("I16", "U16")},
    **{name: _NumberFormat(8) for name in ("I8", "U8", "BOOL")},
}


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    format: _NumberFormat
    begin: int
    end: int


def check_weights_file(path: Path) -> list[str]:
    """Check one safetensors file; returns the names of its tensors.

    Raises:
        WeightsError: It is not a well-formed safetensors file, or holds NaN or infinite numbers.
    """
    size_bytes = path.stat().st_size
    tensors, data_start = _read_header(path, size_bytes)
    _check_layout(path.name, tensors, size_bytes - data_start)
    if size_bytes > data_start:
        data = np.memmap(path, dtype=np.uint8, mode="r", offset=data_start)
        for tensor in tensors:
            if tensor.format.exponent:
                _check_finite(path.name, tensor, data)
    return [tensor.name for tensor in tensors]


def tensor_bytes(path: Path, itemsize: int | None = None) -> int:
    """Bytes that a file's tensors take in memory, by its header alone.

    Args:
        path: A safetensors file.
        itemsize: Bytes of one number once it is loaded; as saved when None.

    Raises:
        WeightsError: It is not a well-formed safetensors file.
        OSError: It cannot be read.
    """
    tensors, _ = _read_header(path, path.stat().st_size)
    return sum((t.end - t.begin) * 8 // t.format.bits * (itemsize or t.format.bits // 8) for t in tensors)


def _read_header(path: Path, size_bytes: int) -> tuple[list[_Tensor], int]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size_bytes < 8 or length > min(size_bytes - 8, MAX_HEADER_BYTES):
            raise WeightsError(f"{path.name} is not a safetensors file: it has no complete header")
        try:
            header = json.loads(file.read(length), object_pairs_hook=_unique_keys)
        except (ValueError, RecursionError) as exc:
            raise WeightsError(f"{path.name} is not a safetensors file: its header is not JSON ({exc})") from exc
    if not isinstance(header, dict):
        raise WeightsError(f"{path.name} is not a safetensors file: its header is not an object")
    tensors = [_parse_tensor(path.name, name, entry) for name, entry in header.items() if name != "__metadata__"]
    if not tensors:
        raise WeightsError(f"{path.name} holds no tensor")
    return sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end)), 8 + length


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _parse_tensor(file_name: str, name: str, entry: Any) -> _Tensor:
    try:
        dtype, shape = str(entry["dtype"]), [_count(n) for n in entry["shape"]]
        begin, end = (_count(n) for n in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as exc:
        raise WeightsError(f"{file_name} is not a safetensors file: bad entry for {name!r} ({exc})") from exc
    number_format = _FORMATS.get(dtype)
    if number_format is None:
        raise WeightsError(
            f"{file_name}: the type {dtype} of {name!r} cannot be checked; save it as float32 or bfloat16"
        )
    if end - begin != math.prod(shape) * (number_format.bits // 8):
        raise WeightsError(f"{file_name}: the shape of {name!r} does not fit its {end - begin} bytes")
    return _Tensor(name, number_format, begin, end)


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


def _check_layout(file_name: str, tensors: list[_Tensor], data_bytes: int) -> None:
    """The tensors must cover the data without holes or overlaps, as the format demands."""
    position = 0
    for tensor in tensors:
        if tensor.begin != position:
            raise WeightsError(f"{file_name}: the tensors overlap or leave a hole before {tensor.name!r}")
        position = tensor.end
    if position != data_bytes:
        raise WeightsError(
            f"{file_name} is cut off or has bytes after its last tensor ({data_bytes} against {position})"
        )


def _check_finite(file_name: str, tensor: _Tensor, data: "np.ndarray[Any, np.dtype[np.uint8]]") -> None:
    unsigned = np.dtype(f"<u{tensor.format.bits // 8}")
    exponent = unsigned.type(tensor.format.exponent)
    for chunk in _chunks(tensor):
        bits = data[chunk].view(unsigned) & exponent
        if bool((bits == exponent).any()):
            what = "NaN" if tensor.format.is_nan_only else "NaN or infinite"
            raise WeightsError(
                f"{file_name}: the weight {tensor.name!r} holds {what} values; the training run diverged"
            )


def _chunks(tensor: _Tensor) -> Iterator[slice]:
    for begin in range(tensor.begin, tensor.end, _CHUNK_BYTES):
        yield slice(begin, min(begin + _CHUNK_BYTES, tensor.end))
