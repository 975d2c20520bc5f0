"""The field `steering` of request bodies and of routes."""

from typing import Any

from pydantic import ValidationError

from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_adapters.contract.params import MAX_ALTERNATIVES, SteeringRequest
from trimtab_server.api.validation import translate, type_name

_MAX_TOKEN_ID = 2**31 - 1


def parse_steering(value: Any) -> SteeringRequest:
    """Validate the field. Raises `InvalidRequestError` naming the field at fault, such as `steering.plausibility`."""
    if isinstance(value, SteeringRequest):
        return value
    if isinstance(value, dict):
        # Unions, of which pydantic would complain once per member.
        _check_negative_prompt(value.get("negative_prompt"))
        _check_explain(value.get("explain", False))
        value = {name: item for name, item in value.items() if not (name == "explain" and item is None)}
    try:
        return SteeringRequest.model_validate(value, strict=True)
    except ValidationError as exc:
        error = translate(exc.errors(include_url=False))
        param = f"steering.{error.param}" if error.param not in (None, "body") else "steering"
        message = error.message.replace(f"'{error.param}'", f"'{param}'")
        raise InvalidRequestError(message, param=param, code=error.code) from exc


def _check_negative_prompt(value: Any) -> None:
    param = "steering.negative_prompt"
    if value is None:
        return
    if not isinstance(value, str | list):
        raise InvalidRequestError(
            f"Invalid type for '{param}': expected a string, an array of token ids or an array of messages, but got "
            f"{type_name(value)} instead.",
            param=param,
            code="invalid_type",
        )
    if not value:
        raise InvalidRequestError(f"Invalid '{param}': it must not be empty.", param=param, code="invalid_value")
    if isinstance(value, str):
        return
    are_ids = all(isinstance(item, int) and not isinstance(item, bool) for item in value)
    if are_ids and all(0 <= item <= _MAX_TOKEN_ID for item in value):
        return
    if are_ids or not all(_is_message(item) for item in value):
        raise InvalidRequestError(
            f"Invalid '{param}': an array must hold only token ids from 0 to {_MAX_TOKEN_ID}, or only messages with "
            "a 'role' and a 'content' that are strings.",
            param=param,
            code="invalid_value",
        )


def _is_message(item: Any) -> bool:
    return (
        isinstance(item, dict)
        and item.keys() == {"role", "content"}
        and all(isinstance(text, str) for text in item.values())
        and 1 <= len(item["role"]) <= 64
    )


def _check_explain(value: Any) -> None:
    if value is None or isinstance(value, bool):
        return
    if not isinstance(value, int):
        raise InvalidRequestError(
            f"Invalid type for 'steering.explain': expected a boolean or an integer, but got {type_name(value)} "
            "instead.",
            param="steering.explain",
            code="invalid_type",
        )
    if not 0 <= value <= MAX_ALTERNATIVES:
        raise InvalidRequestError(
            f"Invalid 'steering.explain': expected a number of alternatives from 0 to {MAX_ALTERNATIVES}, but got "
            f"{value} instead.",
            param="steering.explain",
            code="invalid_value",
        )
