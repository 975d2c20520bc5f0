"""Reading a JSON body: strict about what JSON is, since nothing doubtful may reach the engine."""

import json
import math
import re
from typing import Any

from fastapi import Request
from starlette.exceptions import HTTPException

from trimtab_adapters.contract.errors import InvalidRequestError

_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


async def read_json_object(request: Request) -> dict[str, Any]:
    """The body as a JSON object.

    Refused: another content type than JSON (also none at all: a web page could send that to a local server without
    asking first), anything that is not UTF-8 or not JSON, NaN, infinities, lone surrogates, and what is no object.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise HTTPException(
            415, f"Send the body as 'Content-Type: application/json', not {content_type or 'without'!r}."
        )
    return parse_json_object(await request.body())


def parse_json_object(raw: bytes) -> dict[str, Any]:
    """See `read_json_object`. Raises `InvalidRequestError`."""
    try:
        data = json.loads(raw.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as exc:
        raise InvalidRequestError(
            "We could not parse the JSON body of your request. (HINT: This likely means you aren't using your HTTP "
            f"library correctly. The API expects a JSON payload, but what was sent was not valid JSON: {exc}.)",
            code="invalid_json",
        ) from exc
    if not isinstance(data, dict):
        raise InvalidRequestError("The body must be a JSON object.", code="invalid_json")
    if _SURROGATE_ESCAPE.search(raw):
        _refuse_surrogates(data)
    return data


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large a number")
    return value


def _refuse_surrogates(data: dict[str, Any]) -> None:
    for key, value in data.items():
        for text in _strings([key, value]):
            if any("\ud800" <= char <= "\udfff" for char in text):
                raise InvalidRequestError(
                    f"Invalid {key!r}: the text has a lone surrogate, which is half of a character.",
                    param=key if key.isascii() else None,
                    code="invalid_unicode",
                )


def _strings(value: Any) -> list[str]:
    found, stack = [], [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            found.append(item)
        elif isinstance(item, list):
            stack.extend(item)
        elif isinstance(item, dict):
            stack.extend(item)
            stack.extend(item.values())
    return found
