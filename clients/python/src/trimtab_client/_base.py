"""Requests, retries and answers: everything that the synchronous and the asynchronous client share. No input or output.

Retries. A request is repeated, at most `max_retries` times, when the gateway refused it before it did any work (429 and
503, after the time that `Retry-After` names) or when the connection could not be made. A connection that breaks after
the request was sent is retried only for methods that may be repeated without harm: GET, PUT and DELETE. A stream is
never resumed.
"""

import email.utils
import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import httpx

from trimtab_client._errors import (
    APIConnectionError,
    APIResponseError,
    APIStatusError,
    APITimeoutError,
    status_error,
)
from trimtab_client._version import __version__

T = TypeVar("T")

DEFAULT_BASE_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT = httpx.Timeout(600.0, connect=5.0)
DEFAULT_MAX_RETRIES = 2

FIRST_DELAY_S = 0.5
MAX_DELAY_S = 8.0
MAX_RETRY_AFTER_S = 60.0
"""A gateway that asks for more patience than this gets none: the error is raised at once, with its `retry_after_s`."""

RETRIED_STATUSES = frozenset({429, 503})
REPEATABLE_METHODS = frozenset({"GET", "PUT", "DELETE"})


@dataclass(frozen=True, slots=True)
class Operation(Generic[T]):
    """One call of the API: what to send, and how to read the answer."""

    method: str
    path: str
    decode: Callable[[Any], T]
    body: Mapping[str, Any] | None = None
    query: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_repeatable(self) -> bool:
        """Whether sending it twice does no harm."""
        return self.method in REPEATABLE_METHODS


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """How a client calls. Shared by both clients.

    Attributes:
        base_url: Address of the gateway, without `/v1`.
        api_key: For `/v1`.
        admin_key: For `/admin`; the API key when not given.
        max_retries: Repetitions after the first attempt; 0 turns them off.
    """

    base_url: str
    api_key: str | None
    admin_key: str | None
    max_retries: int

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url must be an http:// or https:// address, not {self.base_url!r}")
        if self.max_retries < 0:
            raise ValueError("max_retries must be 0 or more")

    def request(self, http: "httpx.Client | httpx.AsyncClient", operation: Operation[Any]) -> httpx.Request:
        """Build the HTTP request of an operation."""
        headers = {"User-Agent": f"trimtab-client/{__version__}", "Accept": "application/json"}
        key = (self.admin_key or self.api_key) if operation.path.startswith("/admin") else self.api_key
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        return http.build_request(
            operation.method,
            self.base_url.rstrip("/") + operation.path,
            json=operation.body,
            params=query_values(operation.query),
            headers=headers,
        )

    def delay_after_error(self, operation: Operation[Any], error: Exception, attempt: int) -> float | None:
        """How long to wait before the next attempt, in seconds; None when the error is final.

        Args:
            operation: What was attempted.
            error: An `APIStatusError`, or what httpx raised.
            attempt: Attempts made so far, from 1.
        """
        if attempt > self.max_retries:
            return None
        if isinstance(error, APIStatusError):
            if error.status_code not in RETRIED_STATUSES:
                return None
            if error.retry_after_s is not None:
                return error.retry_after_s if error.retry_after_s <= MAX_RETRY_AFTER_S else None
            return backoff_s(attempt)
        never_sent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
        if never_sent or (operation.is_repeatable and isinstance(error, httpx.TransportError)):
            return backoff_s(attempt)
        return None


def backoff_s(attempt: int) -> float:
    """Exponential back-off with jitter: 0.5 s, 1 s, 2 s ... 8 s, each shortened by up to a quarter."""
    return float(min(FIRST_DELAY_S * 2 ** (attempt - 1), MAX_DELAY_S) * random.uniform(0.75, 1.0))


def read_answer(operation: Operation[T], response: httpx.Response) -> T:
    """Decode the body of a whole response.

    Raises:
        APIStatusError: The status is 400 or above.
        APIResponseError: The body is not what the API promises.
    """
    if response.status_code >= 400:
        raise error_of(response)
    if response.status_code == 204 or not response.content:
        return operation.decode({})
    try:
        value = json.loads(response.content)
    except ValueError as exc:
        raise APIResponseError(
            f"{operation.method} {operation.path} answered {response.status_code} with something that is not JSON: "
            f"{response.text[:200]!r}"
        ) from exc
    return operation.decode(value)


def error_of(response: httpx.Response) -> APIStatusError:
    """The error of a response that has been read and whose status is 400 or above."""
    try:
        body: object = json.loads(response.content)
    except ValueError:
        body = response.text
    return status_error(
        response.status_code,
        body,
        request_id=response.headers.get("x-request-id"),
        retry_after_s=retry_after_s(response.headers),
    )


def connection_error(error: httpx.HTTPError) -> APIConnectionError:
    """Translate what httpx raises."""
    detail = str(error) or type(error).__name__
    if isinstance(error, httpx.TimeoutException):
        return APITimeoutError(f"the gateway did not answer in time: {detail}")
    return APIConnectionError(f"the connection to the gateway failed: {detail}")


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """The `Retry-After` header in seconds from now; None when absent or unreadable. It may be a number or a date."""
    text = headers.get("retry-after", "").strip()
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if seconds < float("inf") else None


def path_of(*parts: str) -> str:
    """Join path segments, quoting each: a route may be called `team/model`."""
    return "/" + "/".join(quote(part, safe="") for part in parts)


def given(**fields: Any) -> dict[str, Any]:
    """The fields that are not None."""
    return {name: value for name, value in fields.items() if value is not None}


def query_values(query: Mapping[str, Any]) -> dict[str, str]:
    """Query parameters as text, booleans as `true` and `false`."""
    return {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in query.items()
        if value is not None
    }
