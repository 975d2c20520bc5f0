"""A small ASGI application that speaks vLLM's HTTP protocol with a `FakeEngine` behind it.

Lets `VllmEngine` and whole gateways be tried over real sockets without a model.
"""

import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from trimtab_adapters.contract.engine_api import PrepareRequest, ReadRequest, TakeReply, TakeRequest, VersionRequest
from trimtab_adapters.contract.errors import (
    AdapterMemoryFullError,
    EngineDiedError,
    EngineRequestError,
    EngineUnavailableError,
    TrimtabError,
)
from trimtab_adapters.contract.params import SteeringParams
from trimtab_server.engine.base import Endpoint, EngineRequest
from trimtab_server.engine.candidate_builder import CandidateBuilder
from trimtab_server.engine.fake import FakeEngine

Handler = Callable[[Request], Awaitable[Response]]


def fake_vllm_app(engine: FakeEngine) -> Starlette:
    """The application. Errors that the fake engine raises are answered as vLLM answers them."""
    routes = [
        Route("/health", _plain(lambda _: engine.status(), empty=True), methods=["GET"]),
        Route("/v1/completions", _generation(engine, "completions"), methods=["POST"]),
        Route("/v1/chat/completions", _generation(engine, "chat.completions"), methods=["POST"]),
        Route("/tokenize", _plain(lambda body: engine.post("/tokenize", body)), methods=["POST"]),
        Route("/detokenize", _plain(lambda body: engine.post("/detokenize", body)), methods=["POST"]),
        Route("/trimtab/status", _plain(lambda _: engine.status()), methods=["GET"]),
        Route("/trimtab/adapters/prepare", _plain(lambda body: _prepare(engine, body)), methods=["POST"]),
        Route("/trimtab/adapters/commit", _plain(lambda body: engine.commit(_version(body))), methods=["POST"]),
        Route("/trimtab/adapters/retire", _plain(lambda body: engine.retire(_version(body))), methods=["POST"]),
        Route("/trimtab/records/take", _plain(lambda body: _take(engine, body)), methods=["POST"]),
        Route("/trimtab/records/read", _plain(lambda body: _read(engine, body)), methods=["POST"]),
    ]
    return Starlette(routes=routes)


def _plain(call: Callable[[Any], Awaitable[Any]], *, empty: bool = False) -> Handler:
    async def handle(request: Request) -> Response:
        body = await request.json() if request.method == "POST" else None
        try:
            answer = await call(body)
        except TrimtabError as exc:
            return _error(exc)
        if empty:
            return Response()
        return JSONResponse(answer if isinstance(answer, dict) else answer.model_dump())

    return handle


def _generation(engine: FakeEngine, endpoint: Endpoint) -> Handler:
    async def handle(request: Request) -> Response:
        body = await request.json()
        try:
            steering = SteeringParams.from_extra_args(body.pop("vllm_xargs", None))
            stream, stream_options = body.pop("stream", False), body.pop("stream_options", None) or {}
            engine_request = EngineRequest(endpoint, body, steering, request.headers.get("x-request-id", ""))
            if stream:
                chunks = _chunks(engine, engine_request, bool(stream_options.get("include_usage")))
                return StreamingResponse(chunks, media_type="text/event-stream")
            return JSONResponse(await _whole(engine, engine_request))
        except TrimtabError as exc:
            return _error(exc)

    return handle


async def _whole(engine: FakeEngine, request: EngineRequest) -> dict[str, Any]:
    """Choice i of `n` is what a request of its own with the seed + i would get, as in vLLM."""
    choices, usage = [], {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    for index in range(request.body.pop("n", 1)):
        seed = request.body.get("seed")
        body = request.body if seed is None else {**request.body, "seed": seed + index}
        uid = request.request_id if index == 0 else f"{request.request_id}-{index}"
        alone = EngineRequest(request.endpoint, body, request.steering, uid)
        builder = CandidateBuilder(alone, engine.name)
        async for delta in engine.raw_stream(alone):
            builder.add(delta)
        candidate = builder.candidate()
        choices.append({**candidate.choice, "index": index})
        usage["prompt_tokens"] = candidate.usage["prompt_tokens"]
        usage["completion_tokens"] += candidate.usage["completion_tokens"]
    usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
    answer = {**_head(request, "text_completion", "chat.completion"), "choices": choices, "usage": usage}
    if request.endpoint == "chat.completions":
        for choice in choices:
            answer["prompt_token_ids"] = choice.pop("prompt_token_ids")
    return answer


async def _chunks(engine: FakeEngine, request: EngineRequest, include_usage: bool) -> AsyncGenerator[str, None]:
    """Errors come inside the stream, the first token's too, as vLLM sends them."""
    head = _head(request, "text_completion", "chat.completion.chunk")
    try:
        async for delta in engine.raw_stream(request):
            chunk: dict[str, Any] = {**head, "choices": [delta.choice] if delta.choice else []}
            if delta.prompt_token_ids is not None:
                place = chunk if request.endpoint == "chat.completions" else delta.choice
                place["prompt_token_ids"] = delta.prompt_token_ids
            if delta.usage is not None:
                if not include_usage:
                    continue
                chunk["usage"] = delta.usage
            yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
    except TrimtabError as exc:
        yield f"data: {json.dumps(_error_body(exc))}\n\n"
    yield "data: [DONE]\n\n"


def _head(request: EngineRequest, whole: str, chat: str) -> dict[str, Any]:
    kind = whole if request.endpoint == "completions" else chat
    return {"id": f"cmpl-{request.request_id}", "object": kind, "created": 0, "model": "base"}


async def _prepare(engine: FakeEngine, body: dict[str, Any]) -> Any:
    message = PrepareRequest.model_validate(body)
    return await engine.prepare(message.version, message.path)


def _version(body: dict[str, Any]) -> str:
    return VersionRequest.model_validate(body).version


async def _take(engine: FakeEngine, body: dict[str, Any]) -> TakeReply:
    uids = TakeRequest.model_validate(body).uids
    records = await engine.take_records(uids)
    return TakeReply(records=list(records.values()), missing=[uid for uid in uids if uid not in records])


async def _read(engine: FakeEngine, body: dict[str, Any]) -> TakeReply:
    starts = ReadRequest.model_validate(body).starts
    records = await engine.read_records(starts)
    return TakeReply(records=list(records.values()), missing=[uid for uid in starts if uid not in records])


def _error_body(exc: TrimtabError) -> dict[str, Any]:
    status = _status(exc)
    code: int | str = exc.code if exc.code and not isinstance(exc, EngineRequestError) and status < 500 else status
    kind = "BadRequestError" if status < 500 else "InternalServerError"
    return {"error": {"message": exc.message, "type": kind, "param": exc.param, "code": code}}


def _status(exc: TrimtabError) -> int:
    if isinstance(exc, EngineRequestError):
        return exc.engine_status
    if isinstance(exc, EngineDiedError):
        return 500  # as vLLM's server does
    if isinstance(exc, AdapterMemoryFullError):
        return 409
    return 503 if isinstance(exc, EngineUnavailableError) else exc.status


def _error(exc: TrimtabError) -> JSONResponse:
    return JSONResponse(_error_body(exc), status_code=_status(exc))
