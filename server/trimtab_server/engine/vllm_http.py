"""A stock vLLM server with Trimtab's plug-ins, over HTTP.

Relies on vLLM 0.32's protocol: `/v1/completions` and `/v1/chat/completions` with `return_token_ids`, `logprobs` and
`vllm_xargs`; errors inside a 200 stream arrive as `data: {"error": ...}`; closing the connection aborts the request.
https://docs.vllm.ai/en/v0.32.0/serving/openai_compatible_server/
"""

import json
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import Any, TypeVar

import httpx
from httpx_sse import EventSource, SSEError
from pydantic import BaseModel, ValidationError

from trimtab_adapters.contract.engine_api import (
    EngineStatus,
    LoadedVersion,
    PrepareRequest,
    RetireReply,
    VersionRequest,
)
from trimtab_adapters.contract.errors import (
    AdapterMemoryFullError,
    EngineDiedError,
    EngineError,
    EngineRequestError,
    EngineUnavailableError,
    SteeringError,
    adapter_error,
)
from trimtab_adapters.contract.params import SteeringParams, VersionId, is_failed_logprob
from trimtab_adapters.contract.records import SteeringRecord
from trimtab_server.engine.base import Candidate, Endpoint, EngineDelta, EngineRequest
from trimtab_server.engine.candidate_slots import CandidateSlots
from trimtab_server.engine.record_fetcher import RecordFetcher
from trimtab_server.engine.sharded_transport import ShardedTransport

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=BaseModel)

_PATHS: dict[Endpoint, str] = {"completions": "/v1/completions", "chat.completions": "/v1/chat/completions"}

# A generation may rightly be silent for minutes (queue, long prefill), so only connecting has a limit.
DEAD_ENGINE = "EngineCore encountered an issue"
"""How the message begins with which vLLM 0.32's server answers 500 after its engine process has died."""

_GENERATE = httpx.Timeout(None, connect=5.0)
_STATUS = httpx.Timeout(10.0, connect=5.0)
_CALL = httpx.Timeout(60.0, connect=5.0)
_LOAD = httpx.Timeout(1800.0, connect=5.0)


_NUM_POOLS = 32
"""Connection pools to one engine: with a thousand candidates in flight each has about thirty connections."""


def build_engine_client(api_key: str | None = None) -> httpx.AsyncClient:
    """An HTTP client for engines: no proxy from the environment, no limit on connections.

    Idle connections are dropped long before the engine's server drops them (75 s, `launch.KEEP_ALIVE_S`), so that no
    request meets a closing one.

    Args:
        api_key: The key that the engine was started with, if any.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else None
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=16, keepalive_expiry=2.0)
    shards = [httpx.AsyncHTTPTransport(limits=limits, trust_env=False) for _ in range(_NUM_POOLS)]
    return httpx.AsyncClient(transport=ShardedTransport(shards), timeout=_CALL, headers=headers, trust_env=False)


class VllmEngine:
    """`Engine` over HTTP.

    Args:
        url: Base address of the engine, without `/v1`.
        name: For logs, metrics and rollouts.
        client: See `build_engine_client`; closed by `aclose`.
        max_concurrent: Candidates in the engine at the same time; more wait here.
        retry_after_s: When callers should ask again while the engine is away, such as a supervisor's estimate.
    """

    def __init__(
        self,
        url: str,
        name: str,
        client: httpx.AsyncClient,
        *,
        max_concurrent: int = 1024,
        retry_after_s: Callable[[], int] = lambda: 1,
    ) -> None:
        self._url = url.rstrip("/")
        self._name = name
        self._client = client
        self._slots = CandidateSlots(max_concurrent)
        self._retry_after_s = retry_after_s
        self._taker = RecordFetcher(self._take)
        self._reader = RecordFetcher(self._read)

    @property
    def name(self) -> str:
        """For logs, metrics and rollouts."""
        return self._name

    async def status(self) -> EngineStatus:
        """What is loaded. Raises `EngineUnavailableError` while the engine is down or starting."""
        with self._translated():
            response = await self._client.get(f"{self._url}/trimtab/status", timeout=_STATUS)
        if response.status_code == 404:
            raise EngineUnavailableError(
                f"the engine at {self._url} is not a Trimtab engine; start it with `trimtab engine`", retry_after_s=10
            )
        if response.is_error:
            raise self._unavailable(f"at {self._url} is not ready: {_message(response)}")
        return _parsed(EngineStatus, response)

    async def generate(self, request: EngineRequest) -> Candidate:
        """Generate one candidate. Cancelling the task closes the connection, on which vLLM aborts the request."""
        (candidate,) = await self._generate(request, 1)
        return candidate

    async def generate_group(self, requests: Sequence[EngineRequest]) -> list[Candidate]:
        """Several candidates in one request: vLLM gives candidate i of `n` the seed + i."""
        return await self._generate(requests[0], len(requests))

    async def _generate(self, request: EngineRequest, num: int) -> list[Candidate]:
        started = time.perf_counter()
        async with self._slots.taken(num):
            with self._translated():
                response = await self._client.post(
                    self._url + _PATHS[request.endpoint],
                    json={**_payload(request, stream=False), "n": num},
                    headers={"X-Request-Id": request.request_id},
                    timeout=_GENERATE,
                )
        if response.is_error:
            raise _refusal(response)
        duration_s = time.perf_counter() - started
        with _well_formed():
            data = json.loads(response.content)
            candidates = [
                self._candidate(request, choice, _beside(data, num, choice), duration_s)
                for choice in sorted(data["choices"], key=lambda choice: int(choice.get("index", 0)))
            ]
        if len(candidates) != num:
            raise EngineError(f"the engine's answer has an unexpected form: {len(candidates)} of {num} candidates")
        if request.steering is not None and _has_failed(candidates[0].token_ids, candidates[0].token_logprobs):
            raise await self._steering_error(request.steering)
        return candidates

    def _candidate(
        self, request: EngineRequest, choice: dict[str, Any], beside: dict[str, Any], duration_s: float
    ) -> Candidate:
        # The chat route has the prompt's beside its choices; a candidate has only one place for them.
        choice.update({key: value for key, value in beside.items() if key != "usage"})
        token_ids, token_logprobs = _tokens(request, choice)
        return Candidate(
            index=0,
            choice=choice,
            text=choice["text"] if request.endpoint == "completions" else choice["message"].get("content") or "",
            prompt_token_ids=choice.get("prompt_token_ids") or [],
            token_ids=token_ids,
            token_logprobs=token_logprobs,
            finish_reason=choice.get("finish_reason"),
            usage=_usage(request, beside["usage"]),
            duration_s=duration_s,
            steering=request.steering,
            engine=self._name,
        )

    async def stream(self, request: EngineRequest) -> AsyncGenerator[EngineDelta, None]:
        """Generate one candidate piece by piece; the last delta has only `usage` and an empty `choice`."""
        is_complete = has_failed = False
        async with self._slots.taken(1):
            with self._translated():
                async with self._client.stream(
                    "POST",
                    self._url + _PATHS[request.endpoint],
                    json=_payload(request, stream=True),
                    headers={"X-Request-Id": request.request_id, "Accept": "text/event-stream"},
                    timeout=_GENERATE,
                ) as response:
                    if response.is_error:
                        await response.aread()
                        raise _refusal(response)
                    async with aclosing(EventSource(response).aiter_sse()) as events:
                        # Read on after [DONE]: a body that was read to its end lets the connection be used again.
                        async for event in events:
                            if event.data == "[DONE]":
                                is_complete = True
                                continue
                            delta = _delta(request, event.data)
                            if request.steering is not None and _has_failed(delta.token_ids, delta.token_logprobs):
                                has_failed = True
                                break
                            yield delta
        if has_failed and request.steering is not None:
            raise await self._steering_error(request.steering)
        if not is_complete:
            raise self._died()

    async def take_records(self, uids: Sequence[str]) -> dict[str, SteeringRecord]:
        """The records of finished candidates, by uid. Concurrent calls share one request to the engine."""
        return await self._taker.fetch(dict.fromkeys(uids, 0))

    async def read_records(self, starts: Mapping[str, int]) -> dict[str, SteeringRecord]:
        """What was recorded so far of running candidates. Concurrent calls share one request to the engine."""
        return await self._reader.fetch(starts)

    async def prepare(self, version: VersionId, path: str) -> LoadedVersion:
        """Load and validate a version.

        Raises:
            AdapterError: It is refused; of the engine's own kind.
            AdapterMemoryFullError: There is no room for it now.
        """
        body = PrepareRequest(version=version, path=path)
        try:
            loaded = _parsed(LoadedVersion, await self._call("/trimtab/adapters/prepare", body.model_dump(), _LOAD))
        except EngineRequestError as exc:
            if exc.engine_status >= 500:
                raise
            if exc.error.get("code") == AdapterMemoryFullError.default_code:
                raise AdapterMemoryFullError(exc.message) from exc
            raise adapter_error(exc.message, exc.error.get("code")) from exc
        if loaded.state == "failed":
            raise adapter_error(loaded.error or f"the engine could not load version {version}", loaded.error_code)
        return loaded

    async def commit(self, version: VersionId) -> LoadedVersion:
        """Make a prepared version usable, between two decoding steps."""
        body = VersionRequest(version=version).model_dump()
        return _parsed(LoadedVersion, await self._call("/trimtab/adapters/commit", body, _CALL))

    async def retire(self, version: VersionId) -> RetireReply:
        """Refuse new rows for a version and free it with the last row that uses it."""
        body = VersionRequest(version=version).model_dump()
        return _parsed(RetireReply, await self._call("/trimtab/adapters/retire", body, _CALL))

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """A plain JSON call to one of the engine's own routes."""
        with _well_formed():
            data: dict[str, Any] = json.loads((await self._call(path, body, _CALL)).content)
            return data

    async def aclose(self) -> None:
        """Close the connections."""
        await self._taker.aclose()
        await self._reader.aclose()
        await self._client.aclose()

    async def _call(self, path: str, body: dict[str, Any], timeout: httpx.Timeout) -> httpx.Response:
        with self._translated():
            response = await self._client.post(self._url + path, json=body, timeout=timeout)
        if response.is_error:
            raise _refusal(response)
        return response

    async def _take(self, starts: Mapping[str, int]) -> dict[str, SteeringRecord]:
        return await self._records("/trimtab/records/take", {"uids": list(starts)})

    async def _read(self, starts: Mapping[str, int]) -> dict[str, SteeringRecord]:
        return await self._records("/trimtab/records/read", {"starts": dict(starts)})

    async def _records(self, path: str, body: dict[str, Any]) -> dict[str, SteeringRecord]:
        data = await self.post(path, body)
        with _well_formed():
            records = [SteeringRecord.model_validate(record) for record in data["records"]]
        return {record.uid: record for record in records}

    async def _steering_error(self, steering: SteeringParams) -> SteeringError:
        try:
            record = (await self.take_records([steering.uid])).get(steering.uid)
        except EngineError as exc:
            logger.warning("no reason for the failed steering of %s: %s", steering.uid, exc.message)
            record = None
        reason = record.error if record is not None and record.error else "the engine did not say why"
        return SteeringError(f"Steering of this request failed: {reason}")

    def _died(self) -> EngineDiedError:
        return EngineDiedError(f"the engine {self._name} broke its answer off", retry_after_s=self._retry_after_s())

    def _unavailable(self, what: str) -> EngineUnavailableError:
        return EngineUnavailableError(f"the engine {what}", retry_after_s=self._retry_after_s())

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn the exceptions of httpx into ours, here and nowhere else."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as exc:
            raise self._unavailable(f"{self._name} cannot be reached; it may be starting") from exc
        except httpx.TimeoutException as exc:
            raise self._unavailable(f"{self._name} does not answer") from exc
        except (httpx.HTTPError, SSEError) as exc:
            raise self._died() from exc


def _payload(request: EngineRequest, *, stream: bool) -> dict[str, Any]:
    body = {**request.body, "n": 1, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    if request.steering is not None:
        body["vllm_xargs"] = {**(body.get("vllm_xargs") or {}), **request.steering.to_xargs()}
    return body


def _beside(data: dict[str, Any], num: int, choice: dict[str, Any]) -> dict[str, Any]:
    """What an answer says beside its choices, of one of `num` of them: what concerns the prompt, and its own usage."""
    names = ("prompt_token_ids", "prompt_logprobs", "prompt_text")
    beside = {name: data[name] for name in names if data.get(name)}
    usage: dict[str, Any] = data["usage"]
    if num > 1:
        # The engine's is the sum over all of them; reasoning tokens cannot be told apart and are left out.
        num_output = len(choice.get("token_ids") or [])
        usage = {**usage, "completion_tokens": num_output, "total_tokens": usage["prompt_tokens"] + num_output}
        usage.pop("completion_tokens_details", None)
    return {**beside, "usage": usage}


def _delta(request: EngineRequest, text: str) -> EngineDelta:
    with _well_formed():
        chunk = json.loads(text)
        if chunk.get("error"):
            raise _stream_error(chunk["error"])
        if not chunk["choices"]:
            return EngineDelta(choice={}, usage=_usage(request, chunk["usage"]))
        choice: dict[str, Any] = chunk["choices"][0]
        choice.update({key: chunk[key] for key in ("prompt_token_ids", "prompt_text") if chunk.get(key)})
        token_ids, token_logprobs = _tokens(request, choice)
        return EngineDelta(
            choice=choice,
            token_ids=token_ids,
            token_logprobs=token_logprobs,
            prompt_token_ids=choice.get("prompt_token_ids"),
        )


def _tokens(request: EngineRequest, choice: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Generated ids and their log-probabilities; those of an echoed prompt come first and are left out."""
    token_ids: list[int] = choice.get("token_ids") or []
    if request.endpoint == "completions" and request.body.get("max_tokens") == 0:
        return [], []  # vLLM samples one token that it does not show
    if not token_ids:
        return [], []
    logprobs = choice.get("logprobs") or {}
    if request.endpoint == "completions":
        values = (logprobs.get("token_logprobs") or [])[-len(token_ids) :]
    else:
        values = [entry["logprob"] for entry in logprobs.get("content") or []][-len(token_ids) :]
    if len(values) != len(token_ids) or None in values:
        # Without them a failed steering could not be seen.
        raise EngineError("the engine sent tokens without log-probabilities")
    return token_ids, values


def _has_failed(token_ids: Sequence[int], token_logprobs: Sequence[float]) -> bool:
    return bool(token_ids) and any(is_failed_logprob(logprob) for logprob in token_logprobs)


def _usage(request: EngineRequest, usage: dict[str, Any]) -> dict[str, Any]:
    if request.endpoint == "completions" and request.body.get("max_tokens") == 0:
        return {**usage, "completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
    return usage


def _refusal(response: httpx.Response) -> EngineError:
    error = _error_object(response)
    message = str(error.get("message") or f"the engine answered {response.status_code}")
    if response.status_code == 503:
        return EngineUnavailableError(message)
    if message.startswith(DEAD_ENGINE):
        return EngineDiedError("the engine broke its answer off")
    return EngineRequestError(message, engine_status=response.status_code, error=error)


def _stream_error(error: dict[str, Any]) -> EngineError:
    code = error.get("code")
    status = code if isinstance(code, int) and 400 <= code < 600 else 500
    message = str(error.get("message") or "the engine failed")
    if status == 503:
        return EngineUnavailableError(message)
    if message.startswith(DEAD_ENGINE):
        return EngineDiedError("the engine broke its answer off")
    return EngineRequestError(message, engine_status=status, error=error)


def _error_object(response: httpx.Response) -> dict[str, Any]:
    try:
        error = json.loads(response.content).get("error")
    except (ValueError, AttributeError):
        return {}
    return error if isinstance(error, dict) else {"message": str(error)} if error else {}


def _message(response: httpx.Response) -> str:
    return str(_error_object(response).get("message") or f"status {response.status_code}")


def _parsed(model: type[M], response: httpx.Response) -> M:
    with _well_formed():
        return model.model_validate_json(response.content)


@contextmanager
def _well_formed() -> Iterator[None]:
    """An answer in an unexpected shape is the engine's error, not a `KeyError`."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, ValidationError) as exc:
        raise EngineError(f"the engine's answer has an unexpected form: {exc!r}") from exc
