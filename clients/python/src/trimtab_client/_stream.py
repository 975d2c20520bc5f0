"""An open completion stream: an iterator of typed chunks. Leaving its `with` block ends the gateway's work for it."""

from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

import httpx

from trimtab_client._base import Operation, connection_error
from trimtab_client._caller import AsyncCaller, Caller
from trimtab_client._streaming import ChunkDecoder

T = TypeVar("T")


class Stream(Generic[T]):
    """The chunks of one answer: `with client.completions.stream(...) as chunks: for chunk in chunks: ...`.

    The request is sent when the block is entered. An error before the first token raises there; an error event in the
    stream, or an end without the closing event, raises from the iteration.
    """

    def __init__(self, caller: Caller, operation: Operation[T]) -> None:
        self._caller = caller
        self._operation = operation
        self._response: httpx.Response | None = None

    def __enter__(self) -> Self:
        self._response = self._caller.open(self._operation)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[T]:
        response = self._response
        if response is None:
            raise RuntimeError("open the stream first: with client.completions.stream(...) as chunks")
        decoder = ChunkDecoder(response.headers.get("x-request-id"))
        try:
            for data in response.iter_bytes():
                for chunk in decoder.feed(data):
                    yield self._operation.decode(chunk)
                if decoder.is_done:
                    return
        except httpx.HTTPError as exc:
            raise connection_error(exc) from exc
        decoder.close()

    @property
    def request_id(self) -> str | None:
        """To find the request in the gateway's log; None before the stream is open."""
        return None if self._response is None else self._response.headers.get("x-request-id")

    def close(self) -> None:
        """End the stream; the gateway stops generating."""
        if self._response is not None:
            self._response.close()


class AsyncStream(Generic[T]):
    """Like `Stream`: `async with client.completions.stream(...) as chunks: async for chunk in chunks: ...`."""

    def __init__(self, caller: AsyncCaller, operation: Operation[T]) -> None:
        self._caller = caller
        self._operation = operation
        self._response: httpx.Response | None = None

    async def __aenter__(self) -> Self:
        self._response = await self._caller.open(self._operation)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def __aiter__(self) -> AsyncIterator[T]:
        response = self._response
        if response is None:
            raise RuntimeError("open the stream first: async with client.completions.stream(...) as chunks")
        decoder = ChunkDecoder(response.headers.get("x-request-id"))
        try:
            async for data in response.aiter_bytes():
                for chunk in decoder.feed(data):
                    yield self._operation.decode(chunk)
                if decoder.is_done:
                    return
        except httpx.HTTPError as exc:
            raise connection_error(exc) from exc
        decoder.close()

    @property
    def request_id(self) -> str | None:
        """To find the request in the gateway's log; None before the stream is open."""
        return None if self._response is None else self._response.headers.get("x-request-id")

    async def aclose(self) -> None:
        """End the stream; the gateway stops generating."""
        if self._response is not None:
            await self._response.aclose()
