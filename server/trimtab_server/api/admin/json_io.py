"""Bodies and answers of the admin API."""

import dataclasses
import json
import math
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict
from starlette.responses import Response
from typing_extensions import override

from trimtab_server.api.json_body import parse_json_object, read_json_object
from trimtab_server.api.validation import parse_body

M = TypeVar("M", bound=BaseModel)


class Body(BaseModel):
    """A request body; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def body_of(model: type[M], *, may_be_empty: bool = False) -> Callable[[Request], Awaitable[M]]:
    """A dependency that reads and validates a JSON body.

    Args:
        model: What the body must be.
        may_be_empty: No body at all means `{}`.
    """

    async def read(request: Request) -> M:
        if may_be_empty and not await request.body():
            return parse_body(model, parse_json_object(b"{}"))
        return parse_body(model, await read_json_object(request))

    return read


class JsonAnswer(Response):
    """A JSON answer from dataclasses, models and plain values. JSON has no NaN or infinity: they become null."""

    media_type = "application/json"

    @override
    def render(self, content: Any) -> bytes:
        """The body, in ASCII, so that any text survives."""
        return json.dumps(_plain(content), allow_nan=False, separators=(",", ":")).encode()


def list_answer(items: Iterable[Any], **more: Any) -> JsonAnswer:
    """OpenAI's list object."""
    return JsonAnswer({"object": "list", "data": list(items), **more})


def _plain(value: Any) -> Any:
    match value:
        case BaseModel():
            return _plain(value.model_dump())
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        case _:
            return value
