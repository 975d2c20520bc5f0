"""What both generation routes do: read, validate, resolve, generate, answer; the work ends when the client leaves."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from trimtab_adapters.contract.errors import EngineTimeoutError
from trimtab_server.api.admission import build_job, rollout_metadata
from trimtab_server.api.answers import Answer
from trimtab_server.api.json_body import read_json_object
from trimtab_server.api.request_fields import GenerationBody
from trimtab_server.api.validation import parse_body
from trimtab_server.decoding.generation import Generator
from trimtab_server.decoding.job import GenerationJob
from trimtab_server.decoding.job_stream import JobStream
from trimtab_server.decoding.selection_stream import SelectionStream
from trimtab_server.engine.base import Endpoint
from trimtab_server.gateway import GatewayParts
from trimtab_server.metrics import RequestTimer
from trimtab_server.sse import DONE, KEEP_ALIVE, ClientDisconnectedError, EventStreamResponse, event, until_disconnect

B = TypeVar("B", bound=GenerationBody)
T = TypeVar("T")

BuildAnswer = Callable[[GenerationJob, B, Generator], Awaitable[Answer]]

CLIENT_CLOSED_REQUEST = 499
"""Nobody reads this answer; it is for the access log."""


async def generate(request: Request, model: type[B], endpoint: Endpoint, build_answer: BuildAnswer[B]) -> Response:
    """Answer one generation request."""
    parts: GatewayParts = request.app.state.parts
    timer: RequestTimer | None = None
    try:
        body = parse_body(model, await read_json_object(request))
        body.check()
        if body.request_id is not None and not request.state.has_caller_request_id:
            request.state.request_id, request.state.has_caller_request_id = body.request_id, True
        resolved = await parts.catalog.resolve(body.model, body.steering, request.state.request_id)
        guidance = await parts.guidance.resolve(resolved.options, endpoint, body.engine_fields())
        generator = parts.generator()
        job = build_job(
            body,
            resolved,
            endpoint=endpoint,
            is_logging=generator.is_logging,
            metadata=rollout_metadata(request, body, resolved),
            guidance=guidance,
            calibration_size=parts.settings.calibration_size,
        )
        timer = RequestTimer(parts.metrics, job, parts.canaries)
        serving = _Serving(request, parts, generator, job, body, timer)
        answer = await build_answer(job, body, generator)
        return await (serving.stream(answer) if body.stream else serving.whole(answer))
    except BaseException as exc:
        if timer is not None:
            timer.end(exc)
        else:
            parts.metrics.fail(endpoint, exc)
        if isinstance(exc, ClientDisconnectedError):
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        raise


class _Serving:
    """One admitted request on its way to its answer."""

    def __init__(
        self,
        request: Request,
        parts: GatewayParts,
        generator: Generator,
        job: GenerationJob,
        body: GenerationBody,
        timer: RequestTimer,
    ) -> None:
        self._receive = request.receive
        self._generator = generator
        self._job = job
        self._body = body
        self._timer = timer
        self._keep_alive_s = parts.settings.keep_alive_s
        timeout_s = parts.settings.request_timeout_s
        self._deadline = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s

    async def whole(self, answer: Answer) -> Response:
        result = await until_disconnect(self._receive, self._in_time(self._generator.complete(self._job)))
        self._timer.result(result, is_logged=self._generator.is_logging)
        response = JSONResponse(answer.whole(result), headers=answer.headers())
        self._timer.end(None)
        return response

    async def stream(self, answer: Answer) -> Response:
        """Wait for the first delta, so that an error before it has its own status, then stream."""
        stream: JobStream | SelectionStream
        if self._job.selection is None:
            stream = JobStream(self._generator, self._job)
        else:
            stream = SelectionStream(self._generator, self._job, keep_alive_s=self._keep_alive_s)
        try:
            await until_disconnect(self._receive, self._in_time(stream.start()))
        except BaseException:
            await stream.aclose()
            raise

        async def on_end(error: BaseException | None) -> None:
            await stream.aclose()
            self._timer.end(error)

        return EventStreamResponse(
            self._events(stream, answer), on_end=on_end, deadline=self._deadline, headers=answer.headers()
        )

    async def _events(self, stream: JobStream | SelectionStream, answer: Answer) -> AsyncGenerator[bytes, None]:
        body = self._body
        async for piece in stream:
            if piece is None:
                yield KEEP_ALIVE
                continue
            self._timer.piece(piece)
            chunk = answer.chunk(piece, include_usage=body.include_usage, continuous_usage=body.continuous_usage)
            if chunk is not None:
                yield event(chunk)
        result = await stream.result()
        self._timer.result(result, is_logged=self._generator.is_logging)
        if body.include_usage:
            yield event(answer.usage_chunk(result))
        yield DONE

    async def _in_time(self, work: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout_at(self._deadline):
                return await work
        except TimeoutError as exc:
            raise EngineTimeoutError("The request took longer than this server allows.") from exc
