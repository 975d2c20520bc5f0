"""Pydantic's complaints in OpenAI's words.

OpenAI's own messages are known from its answers; where one is known it is used, with its `code`.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from trimtab_adapters.contract.errors import InvalidRequestError

M = TypeVar("M", bound=BaseModel)

_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a decimal",
    "bool_type": "a boolean",
    "string_type": "a string",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
_BOUNDS = {
    "greater_than": ("below_min", "below minimum", ">", "gt"),
    "greater_than_equal": ("below_min", "below minimum", ">=", "ge"),
    "less_than": ("above_max", "above maximum", "<", "lt"),
    "less_than_equal": ("above_max", "above maximum", "<=", "le"),
}


def parse_body(model: type[M], data: dict[str, Any]) -> M:
    """Validate a request body. Raises `InvalidRequestError` naming the field at fault."""
    try:
        return model.model_validate(data)
    except ValidationError as exc:
        raise translate(exc.errors(include_url=False)) from exc


def translate(errors: Sequence[ErrorDetails]) -> InvalidRequestError:
    """The first thing to tell the caller about a body that does not fit."""
    unknown = [_path(error) for error in errors if error["type"] == "extra_forbidden"]
    if unknown:
        plural = "s" if len(unknown) > 1 else ""
        return InvalidRequestError(
            f"Unrecognized request argument{plural} supplied: {', '.join(sorted(unknown))}",
            param=unknown[0] if not plural else None,
            code="unknown_parameter",
        )
    error = errors[0]
    param, kind, context, value = _path(error), error["type"], error.get("ctx") or {}, error.get("input")
    if kind == "missing":
        return InvalidRequestError(
            f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter"
        )
    if kind in _EXPECTED:
        return InvalidRequestError(
            f"Invalid type for '{param}': expected {_EXPECTED[kind]}, but got {type_name(value)} instead.",
            param=param,
            code="invalid_type",
        )
    if kind in _BOUNDS:
        code, words, sign, key = _BOUNDS[kind]
        number = "integer" if isinstance(value, int) and isinstance(context[key], int) else "decimal"
        return InvalidRequestError(
            f"Invalid '{param}': {number} {words} value. Expected a value {sign} {_number(context[key])}, "
            f"but got {value} instead.",
            param=param,
            code=f"{number}_{code}_value",
        )
    if kind in ("too_long", "too_short"):
        above = kind == "too_long"
        limit = context["max_length" if above else "min_length"]
        return InvalidRequestError(
            f"Invalid '{param}': array too {'long' if above else 'short'}. Expected an array with "
            f"{'maximum' if above else 'minimum'} length {limit}, but got an array with length "
            f"{context['actual_length']} instead.",
            param=param,
            code=f"array_{'above_max' if above else 'below_min'}_length",
        )
    if kind == "literal_error":
        return InvalidRequestError(
            f"Invalid value: {value!r}. Supported values are: {context['expected']}.",
            param=param,
            code="invalid_value",
        )
    return InvalidRequestError(f"Invalid '{param}': {error['msg']}.", param=param, code="invalid_value")


def type_name(value: Any) -> str:
    """A JSON value's type in OpenAI's words."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int():
            return "an integer"
        case float():
            return "a decimal"
        case str():
            return "a string"
        case list():
            return "an array"
        case _:
            return "an object"


def _path(error: ErrorDetails) -> str:
    """`adapters[0].alpha`; the names of union members, which pydantic adds, are left out by not using unions."""
    path = ""
    for part in error["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path or "body"


def _number(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
