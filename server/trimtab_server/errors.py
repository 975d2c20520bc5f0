"""From an exception to OpenAI's error object: one table, used for answers and for events inside a stream.

| exception | status | `type` |
|---|---|---|
| `RequestError` and `AdapterError` | their own (400, 401, 403, 404, 409) | their own |
| `EngineRequestError`, engine said 4xx | the engine's | `invalid_request_error` |
| `EngineRequestError`, engine said 5xx, 401 or 403 | 502 | `server_error` |
| `EngineUnavailableError`, `EngineDiedError` | 503 and `Retry-After` | `server_error` |
| `RewardUnavailableError`, `RewardChangedError` | 503 and `Retry-After` | `server_error` |
| `EngineTimeoutError` | 504 | `server_error` |
| other `TrimtabError` | their own (500, 502) | `server_error` |
| framework errors (unknown URL, wrong method, body too large) | their own | `invalid_request_error` |
| a request body that FastAPI refused | 400, never 422 | `invalid_request_error` |
| anything else | 500, without internals | `server_error` |
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from trimtab_adapters.contract.errors import (
    AuthenticationError,
    EngineDiedError,
    EngineRequestError,
    EngineUnavailableError,
    RewardChangedError,
    RewardUnavailableError,
    TrimtabError,
)

logger = logging.getLogger(__name__)

INTERNAL_ERROR = "The server had an error while processing your request. The log has the details under the request id."


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """An error as the caller gets it.

    Attributes:
        status: HTTP status.
        error: OpenAI's error object: `message`, `type`, `param`, `code`.
        headers: For example `Retry-After`.
    """

    status: int
    error: dict[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return {"error": self.error}

    def response(self) -> JSONResponse:
        """The HTTP answer."""
        return JSONResponse(self.body, status_code=self.status, headers=dict(self.headers))


def error_object(message: str, type_: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"message": message, "type": type_, "param": param, "code": code}


def error_answer(exc: BaseException) -> ErrorAnswer:
    """What the caller is told about an exception."""
    match exc:
        case EngineRequestError():
            return _engine_refusal(exc)
        case TrimtabError():
            headers: dict[str, str] = {}
            if isinstance(exc, EngineUnavailableError | EngineDiedError):
                headers["Retry-After"] = str(exc.retry_after_s)
            elif isinstance(exc, RewardUnavailableError | RewardChangedError):
                headers["Retry-After"] = str(_retry_after_s(exc))
            elif isinstance(exc, AuthenticationError):
                headers["WWW-Authenticate"] = "Bearer"
            return ErrorAnswer(exc.status, error_object(exc.message, exc.type, param=exc.param, code=exc.code), headers)
        case HTTPException():
            return ErrorAnswer(
                exc.status_code,
                error_object(str(exc.detail), "invalid_request_error" if exc.status_code < 500 else "server_error"),
                exc.headers or {},
            )
        case _:
            return ErrorAnswer(500, error_object(INTERNAL_ERROR, "server_error", code="internal_error"))


def _retry_after_s(exc: RewardUnavailableError | RewardChangedError) -> int:
    """Whole seconds, as the header has them; 1 where nobody knows better."""
    known = exc.retry_after_s if isinstance(exc, RewardUnavailableError) else None
    return max(1, math.ceil(known)) if known is not None else 1


def _engine_refusal(exc: EngineRequestError) -> ErrorAnswer:
    # 401 and 403 concern the gateway's own key at the engine, which is no affair of the caller.
    if 400 <= exc.engine_status < 500 and exc.engine_status not in (401, 403):
        code = exc.error.get("code")
        return ErrorAnswer(
            exc.engine_status,
            error_object(
                exc.message, "invalid_request_error", param=exc.param, code=code if isinstance(code, str) else None
            ),
        )
    logger.error("the engine answered %d: %s", exc.engine_status, exc.message)
    return ErrorAnswer(
        502, error_object("The engine failed while answering this request.", "server_error", code="engine_error")
    )


def _http_error(request: Request, exc: HTTPException) -> ErrorAnswer:
    method, path = request.method, request.url.path
    if exc.status_code == 404 and exc.detail == "Not Found":
        message = f"Unknown request URL: {method} {path}. Please check the URL for typos."
        return ErrorAnswer(404, error_object(message, "invalid_request_error", code="unknown_url"))
    if exc.status_code == 405:
        message = f"Not allowed to {method} on {path}. (HINT: Perhaps you meant to use a different HTTP method?)"
        return ErrorAnswer(
            405, error_object(message, "invalid_request_error", code="method_not_supported"), exc.headers or {}
        )
    return error_answer(exc)


def _body_error(exc: RequestValidationError) -> ErrorAnswer:
    first = exc.errors()[0] if exc.errors() else {"loc": (), "msg": "invalid request"}
    param = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path")) or None
    message = f"Invalid {param!r}: {first['msg']}." if param else f"Invalid request: {first['msg']}."
    return ErrorAnswer(400, error_object(message, "invalid_request_error", param=param, code="invalid_value"))


def install_error_handlers(app: FastAPI) -> None:
    """Make every error answer of the application an OpenAI error object.

    Exceptions outside these families reach `middleware.ErrorBoundary`.
    """

    async def on_trimtab_error(request: Request, exc: Exception) -> JSONResponse:
        answer = error_answer(exc)
        if answer.status >= 500:
            cause = f" ({exc.__cause__!r})" if exc.__cause__ is not None else ""
            logger.error("request %s failed: %s%s", getattr(request.state, "request_id", "-"), exc, cause)
        return answer.response()

    async def on_http_error(request: Request, exc: Exception) -> JSONResponse:
        assert isinstance(exc, HTTPException)
        return _http_error(request, exc).response()

    async def on_body_error(request: Request, exc: Exception) -> JSONResponse:
        assert isinstance(exc, RequestValidationError)
        return _body_error(exc).response()

    app.add_exception_handler(TrimtabError, on_trimtab_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_body_error)
