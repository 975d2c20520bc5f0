"""Column types whose values survive any database bit for bit.

Lists of numbers are packed little-endian: a rollout has several lists as long as its output, and JSON would take three
times the space and lose NaN. None in a list is a NaN of a bit pattern that no arithmetic makes. JSON objects and texts
go into plain text columns with what PostgreSQL cannot hold (the character U+0000, lone surrogates) escaped, because
sampled text holds anything.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from sqlalchemy import Dialect, LargeBinary, Text, TypeDecorator
from typing_extensions import override

_ESCAPE = "\x01"
_NONE_BITS = 0x7FFC_4E4F_4E45_0000
"""A quiet NaN whose payload spells NONE; a NaN that is computed has the payload 0."""


class JsonText(TypeDecorator[Any]):
    """A JSON value as ASCII text. NaN and infinities are written as Python does."""

    impl = Text
    cache_ok = True

    @override
    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        return None if value is None else json.dumps(value, separators=(",", ":"))

    @override
    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        return None if value is None else json.loads(value)


class ExactText(TypeDecorator[str]):
    """Any Python string. Stored as it is, or, when a database could not hold it, as U+0001 and a JSON string."""

    impl = Text
    cache_ok = True

    @override
    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        if value is None or (not value.startswith(_ESCAPE) and "\x00" not in value and _is_encodable(value)):
            return value
        return _ESCAPE + json.dumps(value)

    @override
    def process_result_value(self, value: str | None, dialect: Dialect) -> str | None:
        if value is None or not value.startswith(_ESCAPE):
            return value
        return str(json.loads(value[1:]))


class PackedNumbers(TypeDecorator[list[Any]]):
    """A list of numbers of one NumPy type, such as `<i4`, `<f8` or `?`."""

    impl = LargeBinary
    cache_ok = True

    def __init__(self, number_type: str) -> None:
        super().__init__()
        self.number_type = number_type

    @override
    def process_bind_param(self, value: Sequence[Any] | None, dialect: Dialect) -> bytes | None:
        return None if value is None else np.asarray(value, dtype=self.number_type).tobytes()

    @override
    def process_result_value(self, value: bytes | None, dialect: Dialect) -> list[Any] | None:
        return None if value is None else np.frombuffer(value, dtype=self.number_type).tolist()


class PackedLists(TypeDecorator[list[list[float | None]]]):
    """A list of lists of `<f8` or None, each after its length as `<u4`; the lists may differ in length."""

    impl = LargeBinary
    cache_ok = True

    @override
    def process_bind_param(self, value: Sequence[Sequence[float | None]] | None, dialect: Dialect) -> bytes | None:
        if value is None:
            return None
        rows = [_packed(row) for row in value]
        return b"".join(len(row).to_bytes(4, "little") + row.tobytes() for row in rows)

    @override
    def process_result_value(self, value: bytes | None, dialect: Dialect) -> list[list[float | None]] | None:
        if value is None:
            return None
        rows, position = [], 0
        while position < len(value):
            count = int.from_bytes(value[position : position + 4], "little")
            rows.append(_unpacked(value, count, position + 4))
            position += 4 + 8 * count
        return rows


def _packed(row: Sequence[float | None]) -> "np.ndarray[Any, Any]":
    numbers = np.asarray([0.0 if number is None else number for number in row], dtype="<f8")
    numbers.view("<u8")[[place for place, number in enumerate(row) if number is None]] = _NONE_BITS
    return numbers


def _unpacked(packed: bytes, count: int, offset: int) -> list[float | None]:
    numbers = np.frombuffer(packed, dtype="<f8", count=count, offset=offset)
    row: list[float | None] = numbers.tolist()
    for place in np.flatnonzero(numbers.view("<u8") == _NONE_BITS).tolist():
        row[place] = None
    return row


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
