"""Carries operations out over httpx: the only place that sends, waits and reads. One class per kind of client."""

import time
from typing import Any, TypeVar

import anyio
import httpx

from trimtab_client._base import ClientOptions, Operation, connection_error, error_of, read_answer
from trimtab_client._errors import APIStatusError

T = TypeVar("T")


class Caller:
    """Blocking calls."""

    def __init__(self, http: httpx.Client, options: ClientOptions) -> None:
        self._http = http
        self._options = options

    def send(self, operation: Operation[T]) -> T:
        """Send, with retries, and decode the whole answer."""
        response = self.open(operation)
        try:
            response.read()
        except httpx.HTTPError as exc:
            raise connection_error(exc) from exc
        finally:
            response.close()
        return read_answer(operation, response)

    def open(self, operation: Operation[Any]) -> httpx.Response:
        """Send, with retries, and return the successful response with its body unread. The caller closes it."""
        request = self._options.request(self._http, operation)
        attempt = 0
        while True:
            attempt += 1
            try:
                return self._attempt(request)
            except (APIStatusError, httpx.HTTPError) as exc:
                delay_s = self._options.delay_after_error(operation, exc, attempt)
                if delay_s is None:
                    if isinstance(exc, httpx.HTTPError):
                        raise connection_error(exc) from exc
                    raise
            time.sleep(delay_s)

    def _attempt(self, request: httpx.Request) -> httpx.Response:
        response = self._http.send(request, stream=True)
        if response.status_code < 400:
            return response
        try:
            response.read()
        finally:
            response.close()
        raise error_of(response)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()


class AsyncCaller:
    """The same, awaited."""

    def __init__(self, http: httpx.AsyncClient, options: ClientOptions) -> None:
        self._http = http
        self._options = options

    async def send(self, operation: Operation[T]) -> T:
        """Send, with retries, and decode the whole answer."""
        response = await self.open(operation)
        try:
            await response.aread()
        except httpx.HTTPError as exc:
            raise connection_error(exc) from exc
        finally:
            await response.aclose()
        return read_answer(operation, response)

    async def open(self, operation: Operation[Any]) -> httpx.Response:
        """Send, with retries, and return the successful response with its body unread. The caller closes it."""
        request = self._options.request(self._http, operation)
        attempt = 0
        while True:
            attempt += 1
            try:
                return await self._attempt(request)
            except (APIStatusError, httpx.HTTPError) as exc:
                delay_s = self._options.delay_after_error(operation, exc, attempt)
                if delay_s is None:
                    if isinstance(exc, httpx.HTTPError):
                        raise connection_error(exc) from exc
                    raise
            await anyio.sleep(delay_s)

    async def _attempt(self, request: httpx.Request) -> httpx.Response:
        response = await self._http.send(request, stream=True)
        if response.status_code < 400:
            return response
        try:
            await response.aread()
        finally:
            await response.aclose()
        raise error_of(response)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()
