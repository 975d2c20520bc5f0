"""ASGI middleware: the request id, the size limit of bodies, and the last catch of unexpected errors."""

import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimtab_server.errors import error_answer

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER = "x-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


def is_request_id(value: str) -> bool:
    """Whether a caller's request id is short and plain enough to be echoed and logged."""
    return _REQUEST_ID.fullmatch(value) is not None


class RequestId:
    """Gives each request an id and echoes it in the answer: the caller's `x-request-id`, or one of our own.

    `scope["state"]["request_id"]` has it; `["has_caller_request_id"]` says whether the caller chose it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        presented = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        is_callers = is_request_id(presented)
        request_id = presented if is_callers else f"req-{uuid.uuid4().hex}"
        scope.setdefault("state", {}).update(request_id=request_id, has_caller_request_id=is_callers)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = scope["state"]["request_id"]
            await send(message)

        await self._app(scope, receive, send_with_id)


class BodyLimit:
    """Refuses bodies larger than `max_bytes` with 413, by the declared length or while they arrive."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_bytes:
            await error_answer(self._too_large()).response()(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._max_bytes:
                    raise self._too_large()
            return message

        await self._app(scope, counted, send)

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"The request body is larger than {self._max_bytes} bytes.")


class ErrorBoundary:
    """The last catch: an error that nobody expected is logged whole and answered as a plain 500.

    It sits inside `RequestId`, so the answer carries the id under which the log has the details.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_started = False

        async def watched(message: Message) -> None:
            nonlocal has_started
            has_started = has_started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as exc:  # the stated boundary: whatever it is, the caller gets an error object
            logger.exception("unexpected error in request %s", scope.get("state", {}).get("request_id"))
            if has_started:
                raise  # the server must break the connection: a truncated answer must not look complete
            await error_answer(exc).response()(scope, receive, send)
