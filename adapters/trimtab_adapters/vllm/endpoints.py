"""Trimtab's routes inside vLLM's API server, reaching the workers by `collective_rpc`.

Loaded by the entry point group `vllm.endpoint_plugins` of vLLM 0.32.0, only when `VLLM_PLUGINS` names it. The HTTP
contract is `trimtab_adapters.contract.engine_api`.
"""

import asyncio
import hmac
from argparse import Namespace
from typing import Any

import vllm.envs as envs
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import State
from vllm import SamplingParams
from vllm.engine.protocol import EngineClient

from trimtab_adapters.contract.engine_api import (
    EngineStatus,
    PrepareRequest,
    ReadRequest,
    TakeReply,
    TakeRequest,
    VersionRequest,
)
from trimtab_adapters.contract.errors import AdapterMemoryFullError, ConflictError
from trimtab_adapters.contract.params import Guidance, SteeringParams

_TRIAL_TOKENS = 24
"""Prompt of the request that guidance is tried on."""

_POLL_S = 0.02
"""How often a loading version is asked for; each question stalls decoding by one no-op call."""


class TrimtabEndpoints:
    """The endpoint plug-in: routes under `/trimtab`, meant for the gateway alone."""

    name = "trimtab"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Register the routes."""
        app.include_router(_build_router())

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Attach to the workers before the first request is served."""
        if engine_client is None:
            raise RuntimeError("Trimtab's endpoints need an engine")
        state.trimtab_engine = engine_client
        keys = [key for key in (*(args.api_key or ()), envs.VLLM_API_KEY) if key]
        state.trimtab_keys = [key.encode() for key in keys]
        status = await _call(engine_client, "trimtab_attach")
        await _warm_up(engine_client)
        if status["can_guide"]:
            await _try_guidance(engine_client, EngineStatus.model_validate(status))


async def _warm_up(engine: EngineClient) -> None:
    """Sample one token with log-probabilities, which compiles their kernels: 10 seconds that no request should pay."""
    params = SamplingParams(max_tokens=1, logprobs=0, temperature=0.0, ignore_eos=True)
    async for _ in engine.generate({"prompt_token_ids": [0]}, params, request_id="trimtab-warm-up"):
        pass


async def _try_guidance(engine: EngineClient, status: EngineStatus) -> None:
    """Guide a request by its own prompt: the base must agree with itself, or guidance is refused from now on."""
    length = max(1, min(_TRIAL_TOKENS, status.max_model_len - 2))
    tokens = [number * 7919 % status.num_tokens for number in range(1, length + 1)]
    steering = SteeringParams(
        uid="trimtab-guidance-trial", adapters=[], guidance=Guidance(token_ids=tokens, scale=2.0), record=True
    )
    params = SamplingParams(
        max_tokens=2, logprobs=0, temperature=0.0, ignore_eos=True, extra_args=dict(steering.to_xargs())
    )
    async for _ in engine.generate({"prompt_token_ids": tokens}, params, request_id=steering.uid):
        pass
    await _call(engine, "trimtab_check_guidance", steering.uid)


async def _check_key(request: Request) -> None:
    """vLLM's `--api-key` does not cover routes of plug-ins, so they ask for the same key themselves."""
    keys: list[bytes] = request.app.state.trimtab_keys
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if keys and not (scheme.lower() == "bearer" and any(hmac.compare_digest(given.encode(), key) for key in keys)):
        raise HTTPException(401, "wrong or missing engine key")


async def _call(engine: EngineClient, method: str, *args: Any) -> Any:
    """The answer of the first worker; all of them run the same deterministic code."""
    answers = await engine.collective_rpc(method, args=args)
    return answers[0]


def _answer(value: dict[str, Any]) -> JSONResponse:
    """A worker's answer, or its refusal in OpenAI's error shape."""
    if "status" in value and isinstance(value.get("error"), dict):
        return JSONResponse({"error": value["error"]}, status_code=value["status"])
    if value.get("state") == "failed":
        is_full = value.get("error_code") == AdapterMemoryFullError.default_code  # another time it may fit
        error = {
            "message": value["error"],
            "type": ConflictError.type if is_full else "invalid_request_error",
            "param": None if is_full else "path",
            "code": value.get("error_code") or "invalid_adapter",
        }
        return JSONResponse({"error": error}, status_code=ConflictError.status if is_full else 400)
    return JSONResponse(value)


def _build_router() -> APIRouter:
    router = APIRouter(prefix="/trimtab", dependencies=[Depends(_check_key)])

    @router.get("/status")
    async def status(request: Request) -> JSONResponse:
        return _answer(await _call(request.app.state.trimtab_engine, "trimtab_status"))

    @router.post("/adapters/prepare")
    async def prepare(body: PrepareRequest, request: Request) -> JSONResponse:
        engine = request.app.state.trimtab_engine
        state = await _call(engine, "trimtab_prepare", body.version, body.path)
        while state.get("state") == "loading":
            await asyncio.sleep(_POLL_S)
            state = await _call(engine, "trimtab_poll", body.version)
        return _answer(state)

    @router.post("/adapters/commit")
    async def commit(body: VersionRequest, request: Request) -> JSONResponse:
        return _answer(await _call(request.app.state.trimtab_engine, "trimtab_commit", body.version))

    @router.post("/adapters/retire")
    async def retire(body: VersionRequest, request: Request) -> JSONResponse:
        return _answer(await _call(request.app.state.trimtab_engine, "trimtab_retire", body.version))

    @router.post("/records/take")
    async def take(body: TakeRequest, request: Request) -> TakeReply:
        records = await _call(request.app.state.trimtab_engine, "trimtab_take", body.uids)
        found = {record["uid"] for record in records}
        return TakeReply(records=records, missing=[uid for uid in body.uids if uid not in found])

    @router.post("/records/read")
    async def read(body: ReadRequest, request: Request) -> TakeReply:
        records = await _call(request.app.state.trimtab_engine, "trimtab_read", body.starts)
        found = {record["uid"] for record in records}
        return TakeReply(records=records, missing=[uid for uid in body.starts if uid not in found])

    return router
