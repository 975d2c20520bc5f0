"""The field `selection` of request bodies."""

from typing import Any

from pydantic import ValidationError

from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_adapters.contract.selection import STRATEGIES, SelectionStrategy
from trimtab_server.api.validation import translate, type_name


def parse_selection(value: Any) -> SelectionStrategy:
    """Validate the field. Raises `InvalidRequestError` naming the field at fault, such as `selection.threshold`."""
    if isinstance(value, SelectionStrategy):
        return value
    if not isinstance(value, dict):
        raise InvalidRequestError(
            f"Invalid type for 'selection': expected an object, but got {type_name(value)} instead.",
            param="selection",
            code="invalid_type",
        )
    name = value.get("strategy", "best_of_n")
    if name not in STRATEGIES:
        raise InvalidRequestError(
            f"Invalid value: {name!r}. Supported values are: {', '.join(map(repr, STRATEGIES))}.",
            param="selection.strategy",
            code="invalid_value",
        )
    try:
        given = {key: item for key, item in value.items() if item is not None}
        return STRATEGIES[name].model_validate(given, strict=True)
    except ValidationError as exc:
        error = translate(exc.errors(include_url=False))
        param = f"selection.{error.param}" if error.param not in (None, "body") else "selection"
        message = error.message.replace(f"'{error.param}'", f"'{param}'").replace("Value error, ", "")
        raise InvalidRequestError(message, param=param, code=error.code) from exc
