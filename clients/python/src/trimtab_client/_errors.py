"""The one error tree of the client.

```
TrimtabError
├── APIConnectionError               no answer: refused, reset, name not found
│   ├── APITimeoutError              no answer in time
│   └── StreamInterruptedError       a stream ended before its last event
├── APIResponseError                 an answer that is not what the API promises
└── APIStatusError                   the gateway's error object, with its status
    ├── BadRequestError              400
    ├── AuthenticationError          401
    ├── PermissionDeniedError        403
    ├── NotFoundError                404
    ├── ConflictError                409
    ├── RequestTooLargeError         413
    ├── UnprocessableEntityError     422
    ├── RateLimitError               429   retry_after_s
    └── InternalServerError          >= 500
        ├── BadGatewayError          502   the engine or a reward failed
        └── ServiceUnavailableError  503   no engine is ready; retry_after_s
```

The names are those of OpenAI's client where it has one. An error event inside a stream raises the same class as the
same error before the stream would.
"""

from collections.abc import Mapping
from typing import Any


class TrimtabError(Exception):
    """Root of everything that the client raises on purpose.

    Args:
        message: What went wrong.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class APIConnectionError(TrimtabError):
    """The gateway could not be reached, or the connection broke."""


class APITimeoutError(APIConnectionError):
    """The gateway did not answer in time."""


class StreamInterruptedError(APIConnectionError):
    """The stream ended before its closing event: what arrived is not the whole answer."""


class APIResponseError(TrimtabError):
    """The answer is not what the API promises, for example HTML from a proxy in between."""


class APIStatusError(TrimtabError):
    """The gateway answered with an error.

    Attributes:
        status_code: HTTP status. Of an error inside a stream: the status that its type stands for.
        type: The error object's `type`.
        param: The request field at fault.
        code: A stable machine-readable word, such as `engine_unavailable`.
        request_id: To find the request in the gateway's log.
        retry_after_s: When the gateway asks to be called again, in seconds.
    """

    def __init__(
        self,
        message: str,
        *,
        status_code: int,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.type = type
        self.param = param
        self.code = code
        self.request_id = request_id
        self.retry_after_s = retry_after_s


class BadRequestError(APIStatusError):
    """400: the request is malformed, out of bounds or contradicts itself."""


class AuthenticationError(APIStatusError):
    """401: no key, or a wrong one."""


class PermissionDeniedError(APIStatusError):
    """403: the key may not do this."""


class NotFoundError(APIStatusError):
    """404: an unknown model, adapter, version, route, job or path."""


class ConflictError(APIStatusError):
    """409: the current state forbids it."""


class RequestTooLargeError(APIStatusError):
    """413: the body is larger than the gateway accepts."""


class UnprocessableEntityError(APIStatusError):
    """422."""


class RateLimitError(APIStatusError):
    """429: too many requests."""


class InternalServerError(APIStatusError):
    """500 and above: the failure is the server's."""


class BadGatewayError(InternalServerError):
    """502: the engine failed, or a reward could not be computed."""


class ServiceUnavailableError(InternalServerError):
    """503: no engine or reward is ready, or it went away; the same request may be sent again."""


STATUS_CLASSES: Mapping[int, type[APIStatusError]] = {
    400: BadRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    413: RequestTooLargeError,
    422: UnprocessableEntityError,
    429: RateLimitError,
    502: BadGatewayError,
    503: ServiceUnavailableError,
}

STREAM_STATUSES: Mapping[str, int] = {
    "engine_unavailable": 503,
    "engine_died": 503,
    "engine_error": 502,
    "reward_failed": 502,
    "reward_unavailable": 503,
    "reward_changed": 503,
    "invalid_request_error": 400,
    "authentication_error": 401,
    "permission_error": 403,
    "not_found_error": 404,
    "conflict_error": 409,
    "rate_limit_error": 429,
}
"""Status of an error event, whose own status line was sent long ago: by its `code`, then by its `type`; else 500."""


def status_error(
    status_code: int,
    body: object,
    *,
    request_id: str | None = None,
    retry_after_s: float | None = None,
) -> APIStatusError:
    """Build the error of the class that fits the status.

    Args:
        status_code: HTTP status, 400 or above.
        body: The decoded JSON body, or its text when it is not JSON.
        request_id: From the `x-request-id` header.
        retry_after_s: From the `Retry-After` header.
    """
    fields = error_object(body)
    message = fields.get("message")
    if not isinstance(message, str) or not message:
        message = body.strip()[:500] if isinstance(body, str) and body.strip() else f"HTTP status {status_code}"
    fallback = InternalServerError if status_code >= 500 else APIStatusError
    return STATUS_CLASSES.get(status_code, fallback)(
        message,
        status_code=status_code,
        type=_text(fields.get("type")),
        param=_text(fields.get("param")),
        code=_text(fields.get("code")),
        request_id=request_id,
        retry_after_s=retry_after_s,
    )


def stream_error(body: Mapping[str, Any], *, request_id: str | None = None) -> APIStatusError:
    """Build the error of an event `{"error": {...}}` inside a stream."""
    fields = error_object(body)
    code = fields.get("code")
    if isinstance(code, int) and 400 <= code <= 599:  # vLLM's own error objects carry the status as code
        status_code = code
    else:
        named = (STREAM_STATUSES.get(str(fields.get(key))) for key in ("code", "type"))
        status_code = next((status for status in named if status is not None), 500)
    return status_error(status_code, body, request_id=request_id)


def error_object(body: object) -> Mapping[str, Any]:
    """The error object inside a body, or an empty one."""
    if isinstance(body, dict):
        error = body.get("error")
        if isinstance(error, dict):
            return error
        if isinstance(error, str):
            return {"message": error}
        for key in ("detail", "message"):
            if isinstance(body.get(key), str):
                return {"message": body[key]}
    return {}


def _text(value: object) -> str | None:
    return None if value is None else str(value)
