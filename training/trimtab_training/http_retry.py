"""Requests that survive a busy or restarting gateway, and its error answers as exceptions."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import httpx

from trimtab_adapters.contract.errors import (
    AuthenticationError,
    ConflictError,
    EngineDiedError,
    EngineError,
    EngineUnavailableError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    RewardChangedError,
    RewardError,
    RewardUnavailableError,
    TrimtabError,
)
from trimtab_training.interruption import Interruption

_BUSY = (429, 503)
_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 10.0

_BY_STATUS: Mapping[int, type[TrimtabError]] = {
    400: InvalidRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    413: InvalidRequestError,
    422: InvalidRequestError,
    503: EngineUnavailableError,
}
_BY_CODE: Mapping[str, type[TrimtabError]] = {
    "reward_failed": RewardError,
    "reward_unavailable": RewardUnavailableError,
    "reward_changed": RewardChangedError,
    "engine_died": EngineDiedError,
}


class RetryingClient:
    """An `httpx.Client` that asks again when nothing was done yet: refused connections, 429 and 503.

    A call that may be repeated is also sent again when its connection broke or the engine died over it.

    Args:
        client: Owned by this object.
        retry_for_s: How long one call is tried, waits included.
        interruption: Ends a wait with `TrainingInterrupted`.
    """

    def __init__(self, client: httpx.Client, *, retry_for_s: float, interruption: Interruption) -> None:
        self._client = client
        self._retry_for_s = retry_for_s
        self._interruption = interruption

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def call(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str],
        json: Mapping[str, Any] | None,
        repeatable: bool = True,
    ) -> httpx.Response:
        """A JSON call; returns only successful answers. `json` None sends no body.

        Raises:
            TrimtabError: Of the class that the status and code stand for.
        """
        deadline = time.monotonic() + self._retry_for_s
        wait_s = _FIRST_WAIT_S
        body = None if json is None else dict(json)
        while True:
            try:
                response = self._client.request(method, path, headers=dict(headers), json=body)
            except httpx.TransportError as exc:
                refused = isinstance(exc, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
                if not (refused or repeatable) or time.monotonic() + wait_s > deadline:
                    raise self._unreachable(exc) from exc
            else:
                if response.is_success:
                    return response
                error = error_of(response)
                is_transient = response.status_code in _BUSY or (repeatable and isinstance(error, EngineDiedError))
                wait_s = _retry_after_s(response) or wait_s
                if not is_transient or time.monotonic() + wait_s > deadline:
                    raise error
            self._interruption.wait(wait_s)
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    def lines(self, path: str, *, params: Mapping[str, Any], headers: Mapping[str, str]) -> Iterator[str]:
        """Non-empty lines of a streamed answer. Not sent again: part of it may have been used."""
        try:
            with self._client.stream("GET", path, params=dict(params), headers=dict(headers)) as response:
                if not response.is_success:
                    response.read()
                    raise error_of(response)
                for line in response.iter_lines():
                    self._interruption.check()
                    if line.strip():
                        yield line
        except httpx.TransportError as exc:
            raise self._unreachable(exc) from exc

    def _unreachable(self, exc: httpx.TransportError) -> EngineUnavailableError:
        return EngineUnavailableError(
            f"the gateway at {self._client.base_url} did not answer ({type(exc).__name__}: {exc})"
        )


def error_of(response: httpx.Response) -> TrimtabError:
    """The exception that an error answer stands for, with the gateway's own message."""
    try:
        body = response.json()
        error = body["error"]
        message, code, param = str(error["message"]), error.get("code"), error.get("param")
    except (ValueError, KeyError, TypeError, AttributeError):
        message, code, param = response.text[:500] or response.reason_phrase, None, None
    kind = _BY_CODE.get(str(code)) or _BY_STATUS.get(response.status_code, EngineError)
    what = f"{response.request.method} {response.request.url.path}: {message} (HTTP {response.status_code})"
    # These say when to come back instead of what was wrong.
    if kind in (EngineUnavailableError, EngineDiedError, RewardUnavailableError):
        return kind(what)
    return kind(what, param=param, code=code)


def _retry_after_s(response: httpx.Response) -> float | None:
    try:
        return max(0.0, float(response.headers["retry-after"]))
    except (KeyError, ValueError):
        return None
