"""JSON into the client's dataclasses: what is missing takes its default, what is unknown goes to `extra` or away."""

import dataclasses
import types
import typing
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

from trimtab_client._errors import APIResponseError

T = TypeVar("T")


def decode(kind: type[T], value: object) -> T:
    """Build a `kind` from a decoded JSON object.

    Raises:
        APIResponseError: It is not an object, or a field without a default is missing.
    """
    if not isinstance(value, dict):
        raise APIResponseError(f"expected a {kind.__name__} object, got {_excerpt(value)}")
    converters, required = _fields(kind)  # type: ignore[arg-type]
    missing = required - value.keys()
    if missing:
        raise APIResponseError(f"a {kind.__name__} object lacks {', '.join(sorted(missing))}: {_excerpt(value)}")
    known = {name: converters[name](item) for name, item in value.items() if name in converters and name != "extra"}
    if "extra" in converters:
        known["extra"] = {name: item for name, item in value.items() if name not in known}
    return kind(**known)


def decode_list(kind: type[T], value: object) -> list[T]:
    """The objects of a list answer, `{"data": [...]}`."""
    if not isinstance(value, dict) or not isinstance(value.get("data"), list):
        raise APIResponseError(f"expected a list of {kind.__name__} objects under `data`, got {_excerpt(value)}")
    return [decode(kind, item) for item in value["data"]]


@cache
def _fields(kind: type[Any]) -> tuple[dict[str, Callable[[object], object]], frozenset[str]]:
    """A converter for each field, and the names of the fields without a default."""
    hints = typing.get_type_hints(kind)
    fields = dataclasses.fields(kind)
    missing = dataclasses.MISSING
    required = frozenset(f.name for f in fields if f.default is missing and f.default_factory is missing)
    return {f.name: _converter(hints[f.name], has_default=f.name not in required) for f in fields}, required


def _converter(hint: Any, *, has_default: bool = True) -> Callable[[object], object]:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        # A delta or message may be null where the type has a default: an empty one stands for it.
        return lambda value: decode(hint, {} if value is None and has_default else value)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        inner = [argument for argument in arguments if argument is not type(None)]
        convert = _converter(inner[0], has_default=False) if len(inner) == 1 else _same
        return lambda value: None if value is None else convert(value)
    if origin is list:
        convert_item = _converter(arguments[0], has_default=False)
        return lambda value: [convert_item(item) for item in value] if isinstance(value, list) else value
    return _same


def _same(value: object) -> object:
    return value


def _excerpt(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
