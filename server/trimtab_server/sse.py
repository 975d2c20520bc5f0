"""Server-sent events, and the client's disconnect as the end of our work."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from typing_extensions import override

from trimtab_adapters.contract.errors import EngineTimeoutError, TrimtabError
from trimtab_server.errors import error_answer

logger = logging.getLogger(__name__)

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
"""A comment: clients skip it, but see that the connection lives."""


class ClientDisconnectedError(Exception):
    """The client went away before its answer was complete; the work for it has been cancelled."""


def event(data: Mapping[str, Any]) -> bytes:
    """One event. Pure ASCII, so that no reader can take a Unicode line separator inside it for the end of a line."""
    return b"data: " + json.dumps(data, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n\n"


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do `work`, but cancel it when the client disconnects. The request body must have been read before.

    Raises:
        ClientDisconnectedError: The client went away first.
    """
    working, watching = asyncio.create_task(work), asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnectedError
    finally:
        await _cancel(working, watching)


class EventStreamResponse(Response):
    """An event stream whose generator is closed when the client disconnects, even while no event is due.

    Status 200 is sent with the first event. An error after that becomes an event of its own and the stream ends
    without `[DONE]`, which OpenAI's clients raise as `APIError`.

    Args:
        events: The encoded events, `DONE` included.
        on_end: Called once at the end with the error, or None.
        deadline: Loop time at which the stream is cut off with an error event.
        headers: More headers.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        on_end: Callable[[BaseException | None], Awaitable[None]],
        deadline: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status_code = 200
        self.background = None
        self._events = events
        self._on_end = on_end
        self._deadline = deadline
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})})

    @override
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        outcome: BaseException | None = None
        try:
            outcome = await until_disconnect(receive, self._send_all(send))
        except (ClientDisconnectedError, OSError, asyncio.CancelledError) as exc:
            outcome = exc
            if isinstance(exc, asyncio.CancelledError):
                raise
        finally:
            await self._events.aclose()
            await self._on_end(outcome)

    async def _send_all(self, send: Send) -> BaseException | None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        error: BaseException | None = None
        try:
            async with asyncio.timeout_at(self._deadline):
                async for data in self._events:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
        except TimeoutError:
            error = EngineTimeoutError("The request took longer than this server allows.")
        except TrimtabError as exc:
            error = exc
        except OSError:
            raise
        except Exception as exc:  # a boundary: the head is sent, an event is the only way to tell
            logger.exception("unexpected error inside a stream")
            error = exc
        if error is not None:
            logger.error("a stream ended with an error: %s", error)
            await send({"type": "http.response.body", "body": event(error_answer(error).body), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return error


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
