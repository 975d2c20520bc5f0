"""A deterministic engine without a model, for tests and client examples. Shipped, not a test trick.

It behaves as a real one where callers can see it: log-probabilities and ids in vLLM's shapes, stop strings, versions
that must be prepared and committed, records that can be taken once, and failures where they are asked for.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from trimtab_adapters.contract.engine_api import CacheStatus, EngineStatus, LoadedVersion, RetireReply, WeightStatus
from trimtab_adapters.contract.errors import (
    AdapterError,
    AdapterMemoryFullError,
    EngineRequestError,
    EngineUnavailableError,
    SteeringError,
    TrimtabError,
)
from trimtab_adapters.contract.params import FAILED_LOGPROB, VersionId, is_failed_logprob
from trimtab_adapters.contract.records import SteeringRecord
from trimtab_server.engine import fake_model
from trimtab_server.engine.base import Candidate, EngineDelta, EngineRequest
from trimtab_server.engine.candidate_builder import CandidateBuilder


@dataclass(slots=True)
class Fault:
    """What goes wrong with a request.

    Attributes:
        error: Raised after `after_tokens` tokens; None when only `steering` fails.
        steering: The reason of a steering failure at the token after `after_tokens`.
        after_tokens: Tokens that are still fine.
    """

    error: TrimtabError | None = None
    steering: str | None = None
    after_tokens: int = 0


@dataclass(slots=True)
class Observed:
    """What the engine has seen, for assertions."""

    requests: list[EngineRequest] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    taken: list[list[str]] = field(default_factory=list)
    read: list[dict[str, int]] = field(default_factory=list)
    posted: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    calls: list[tuple[str, str]] = field(default_factory=list)
    running: int = 0
    max_running: int = 0


class FakeEngine:
    """An `Engine` that speaks words by hash.

    Args:
        name: As for any engine.
        model: Reported by `status`.
        max_model_len: Prompts that leave no room are refused with 400, as vLLM does.
        has_chat_template: Without one chat requests are refused, as vLLM does.
        can_guide: Reported by `status`.
        fault_for: Decides per request what goes wrong.
        refuse_version: Reason for which `prepare` refuses a version, or None.
        weight_budget_bytes: Budget of adapter memory; None means no bound.
        weight_bytes: What a version takes of it.
    """

    def __init__(
        self,
        name: str = "fake",
        *,
        model: str = "base",
        max_model_len: int = 4096,
        has_chat_template: bool = True,
        can_guide: bool = True,
        fault_for: Callable[[EngineRequest], Fault | None] | None = None,
        refuse_version: Callable[[VersionId], AdapterError | None] | None = None,
        weight_budget_bytes: int | None = None,
        weight_bytes: Callable[[VersionId], int] = lambda version: 1,
    ) -> None:
        self._name = name
        self._model = model
        self._max_model_len = max_model_len
        self._has_chat_template = has_chat_template
        self._can_guide = can_guide
        self.fault_for = fault_for
        self.refuse_version = refuse_version
        self.weight_budget_bytes = weight_budget_bytes
        self.weight_bytes = weight_bytes
        self.is_up = True
        self.boot_id = uuid.uuid4().hex
        self.observed = Observed()
        self.versions: dict[VersionId, LoadedVersion] = {}
        self._records: dict[str, SteeringRecord] = {}
        self._gate = asyncio.Event()
        self._gate.set()
        self._open_tokens = 0
        self.reached_gate = asyncio.Event()
        self.load_gate = asyncio.Event()
        self.load_gate.set()

    @property
    def name(self) -> str:
        """For logs, metrics and rollouts."""
        return self._name

    def hold_after(self, num_tokens: int) -> None:
        """Let each candidate say `num_tokens` tokens, then wait for `release`. `reached_gate` is set by the first."""
        self._open_tokens = num_tokens
        self.reached_gate.clear()
        self._gate.clear()

    def release(self) -> None:
        """Let held candidates go on."""
        self._gate.set()

    def restart(self) -> None:
        """Forget everything, as a new process would."""
        self.boot_id = uuid.uuid4().hex
        self.versions.clear()
        self._records.clear()

    async def status(self) -> EngineStatus:
        """What is loaded."""
        self._check_up()
        self.observed.calls.append(("status", ""))
        return EngineStatus(
            boot_id=self.boot_id,
            vllm_version="0.32.0",
            runner="v1",
            model=self._model,
            max_model_len=self._max_model_len,
            vocab_size=fake_model.VOCAB_SIZE,
            vocabulary_sha256="0" * 64,
            num_tokens=fake_model.VOCAB_SIZE,
            versions=[version.model_copy() for version in self.versions.values()],
            cache=CacheStatus(
                budget_bytes=0,
                allocated_bytes=0,
                used_blocks=0,
                cached_blocks=0,
                total_blocks=0,
                block_size=16,
                hit_tokens=0,
                computed_tokens=0,
                recomputed_tokens=0,
            ),
            weights=WeightStatus(budget_bytes=self.weight_budget_bytes, used_bytes=self.used_weight_bytes),
            can_guide=self._can_guide,
        )

    @property
    def used_weight_bytes(self) -> int:
        """Adapter memory of the versions that are loaded or loading."""
        return sum(version.weight_bytes for version in self.versions.values() if version.state != "failed")

    async def generate(self, request: EngineRequest) -> Candidate:
        """Generate one candidate."""
        builder = CandidateBuilder(request, self._name)
        async with aclosing(self._checked(request)) as deltas:
            async for delta in deltas:
                builder.add(delta)
        return builder.candidate()

    async def generate_group(self, requests: Sequence[EngineRequest]) -> list[Candidate]:
        """Generate them one beside the other."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self.generate(request)) for request in requests]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    def stream(self, request: EngineRequest) -> AsyncIterator[EngineDelta]:
        """Generate one candidate token by token."""
        return self._checked(request)

    async def take_records(self, uids: Sequence[str]) -> dict[str, SteeringRecord]:
        """The records of finished candidates; each can be taken once."""
        self._check_up()
        self.observed.taken.append(list(uids))
        return {uid: self._records.pop(uid) for uid in uids if uid in self._records}

    async def read_records(self, starts: Mapping[str, int]) -> dict[str, SteeringRecord]:
        """What was recorded so far, from a token on; it stays."""
        self._check_up()
        self.observed.read.append(dict(starts))
        return {uid: _from(self._records[uid], start) for uid, start in starts.items() if uid in self._records}

    async def prepare(self, version: VersionId, path: str) -> LoadedVersion:
        """Load a version; waits for `load_gate`."""
        self._check_up()
        self.observed.calls.append(("prepare", version))
        if version in self.versions and self.versions[version].state in ("prepared", "committed"):
            return self.versions[version]
        weight_bytes = self.weight_bytes(version)
        self.versions.pop(version, None)
        if self.weight_budget_bytes is not None and self.used_weight_bytes + weight_bytes > self.weight_budget_bytes:
            self.versions[version] = LoadedVersion(
                version=version, name="", state="failed", weight_bytes=weight_bytes, error_code="adapter_memory_full"
            )
            raise AdapterMemoryFullError("the adapter memory is full")
        self.versions[version] = LoadedVersion(version=version, name="", state="loading", weight_bytes=weight_bytes)
        try:
            await self.load_gate.wait()
            if self.refuse_version is not None and (error := self.refuse_version(version)) is not None:
                raise error
        except BaseException:
            self.versions.pop(version, None)
            raise
        self.versions[version] = LoadedVersion(
            version=version, name="adapter", state="prepared", weight_bytes=weight_bytes
        )
        return self.versions[version]

    async def commit(self, version: VersionId) -> LoadedVersion:
        """Make a prepared version usable."""
        self._check_up()
        self.observed.calls.append(("commit", version))
        if version not in self.versions:
            raise EngineRequestError(f"version {version} is not prepared", engine_status=404)
        self.versions[version] = self.versions[version].model_copy(update={"state": "committed"})
        return self.versions[version]

    async def retire(self, version: VersionId) -> RetireReply:
        """Free a version."""
        self._check_up()
        self.observed.calls.append(("retire", version))
        self.versions.pop(version, None)
        return RetireReply(version=version, freed=True, active_rows=0)

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """`/tokenize` and `/detokenize`."""
        self._check_up()
        self.observed.posted.append((path, body))
        if path == "/tokenize":
            text = body["prompt"] if "prompt" in body else self._render_chat(body["messages"])
            tokens = fake_model.tokenize(text)
            return {"count": len(tokens), "max_model_len": self._max_model_len, "tokens": tokens, "token_strs": None}
        if path == "/detokenize":
            if any(not 0 <= token < fake_model.VOCAB_SIZE for token in body["tokens"]):
                raise EngineRequestError("token id out of vocabulary", engine_status=400)
            return {"prompt": fake_model.detokenize(body["tokens"])}
        raise EngineRequestError("Not Found", engine_status=404)

    async def aclose(self) -> None:
        """Nothing to close."""

    async def raw_stream(self, request: EngineRequest) -> AsyncGenerator[EngineDelta, None]:
        """Like `stream`, but a failed steering shows as `FAILED_LOGPROB` at its token, as over HTTP."""
        self._check_up()
        self.observed.requests.append(request)
        self.observed.running += 1
        self.observed.max_running = max(self.observed.max_running, self.observed.running)
        is_finished = False
        try:
            async for delta in _Speech(self, request).deltas():
                yield delta
            is_finished = True
            self.observed.finished.append(request.request_id)
        finally:
            self.observed.running -= 1
            if not is_finished:
                self.observed.aborted.append(request.request_id)

    async def _checked(self, request: EngineRequest) -> AsyncGenerator[EngineDelta, None]:
        async with aclosing(self.raw_stream(request)) as deltas:
            async for delta in deltas:
                if request.steering is not None and any(is_failed_logprob(value) for value in delta.token_logprobs):
                    record = self._records.pop(request.steering.uid, None)
                    raise SteeringError(f"Steering of this request failed: {record.error if record else 'unknown'}")
                yield delta

    def keep_record(self, record: SteeringRecord) -> None:
        """Keep a record until it is taken."""
        self._records[record.uid] = record

    async def wait_at_gate(self, num_tokens: int) -> None:
        """Wait for `release` once `num_tokens` reached what `hold_after` allows."""
        if num_tokens >= self._open_tokens and not self._gate.is_set():
            self.reached_gate.set()
            await self._gate.wait()

    def prompt_of(self, request: EngineRequest) -> list[int]:
        """The ids of a request's prompt, or the refusal that vLLM would answer."""
        body = request.body
        if request.endpoint == "chat.completions":
            prompt = fake_model.tokenize(self._render_chat(body["messages"]))
        else:
            raw = body["prompt"]
            prompt = fake_model.tokenize(raw) if isinstance(raw, str) else list(raw)
        if len(prompt) >= self._max_model_len:
            raise EngineRequestError(
                f"This model's maximum context length is {self._max_model_len} tokens. However, your request has "
                f"{len(prompt)} input tokens. Please reduce the length of the input messages.",
                engine_status=400,
            )
        return prompt

    def _render_chat(self, messages: Sequence[dict[str, Any]]) -> str:
        if not self._has_chat_template:
            raise EngineRequestError(
                "As of transformers v4.44, default chat template is no longer allowed, so you must provide a chat "
                "template if the tokenizer does not define one.",
                engine_status=400,
            )
        return fake_model.render_chat(messages)

    def check_versions(self, request: EngineRequest) -> None:
        """Refuse a steering whose versions are not committed."""
        for weight in request.steering.adapters if request.steering is not None else ():
            loaded = self.versions.get(weight.version)
            if loaded is None or loaded.state != "committed":
                raise EngineRequestError(f"adapter version {weight.version} is not loaded", engine_status=400)

    def _check_up(self) -> None:
        if not self.is_up:
            raise EngineUnavailableError(f"the engine {self._name} cannot be reached; it may be starting")


def _from(record: SteeringRecord, start: int) -> SteeringRecord:
    negative, alternatives = record.negative_logprobs, record.alternatives
    return record.model_copy(
        update={
            "num_tokens": max(record.num_tokens - start, 0),
            "token_ids": record.token_ids[start:],
            "base_logprobs": record.base_logprobs[start:],
            "adapter_logprobs": [values[start:] for values in record.adapter_logprobs],
            "negative_logprobs": None if negative is None else negative[start:],
            "steered_logprobs": record.steered_logprobs[start:],
            "kl": record.kl[start:],
            "flipped": record.flipped[start:],
            "alternatives": None if alternatives is None else alternatives[start:],
        }
    )


class _Speech:
    """One request being answered."""

    def __init__(self, engine: FakeEngine, request: EngineRequest) -> None:
        self._engine = engine
        self._request = request
        self._is_chat = request.endpoint == "chat.completions"
        logprobs = request.body.get("logprobs")
        self._logprobs_asked = logprobs is not None and logprobs is not False  # 0 is asked
        # Without a seed candidates differ by their number, and are the same in every run.
        self._seed = request.body.get("seed", request.request_id.rpartition("-")[2])
        self._record = SteeringRecord(uid=request.steering.uid) if request.steering is not None else None
        self._offset = 0

    async def deltas(self) -> AsyncGenerator[EngineDelta, None]:
        body, engine = self._request.body, self._engine
        fault = engine.fault_for(self._request) if engine.fault_for is not None else None
        if fault is not None and fault.error is not None and fault.after_tokens == 0:
            raise fault.error
        engine.check_versions(self._request)
        prompt = engine.prompt_of(self._request)
        limit = body.get("max_completion_tokens", body.get("max_tokens", 16))
        echoed = prompt if not self._is_chat and body.get("echo") else []
        await engine.wait_at_gate(0)
        if self._is_chat:
            yield EngineDelta(
                choice={"index": 0, "delta": {"role": "assistant", "content": ""}}, prompt_token_ids=prompt
            )
        if limit == 0:
            yield self._delta("", [], [], "length", None, prompt, echoed)
        text, num_tokens = "", 0
        while num_tokens < limit:
            if fault is not None and num_tokens == fault.after_tokens and fault.error is not None:
                raise fault.error
            has_failed = fault is not None and fault.steering is not None and num_tokens == fault.after_tokens
            token = self._next(prompt, num_tokens)
            logprob = FAILED_LOGPROB if has_failed else token.steered_logprob
            self._note(token, fault.steering if has_failed and fault is not None else None)
            num_tokens += 1
            piece, stop = self._stopped(text, token.text)
            text += piece
            finish = "stop" if stop is not None else "length" if num_tokens >= limit else None
            yield self._delta(
                piece,
                [token.id],
                [logprob],
                finish,
                stop,
                prompt if num_tokens == 1 else None,
                echoed if num_tokens == 1 else [],
            )
            if finish is not None:
                break
            await engine.wait_at_gate(num_tokens)
        if self._record is not None:
            engine.keep_record(self._record)
        total = len(prompt) + num_tokens
        yield EngineDelta(
            choice={}, usage={"prompt_tokens": len(prompt), "completion_tokens": num_tokens, "total_tokens": total}
        )

    def _next(self, prompt: list[int], position: int) -> fake_model.FakeToken:
        steering, greedy = self._request.steering, self._request.body.get("temperature") == 0
        if steering is None:
            return fake_model.next_token(prompt, position, (), seed=self._seed, greedy=greedy)
        return fake_model.next_token_of(prompt, position, steering, seed=self._seed, greedy=greedy)

    def _stopped(self, text: str, piece: str) -> tuple[str, str | None]:
        stops = self._request.body.get("stop") or []
        for stop in [stops] if isinstance(stops, str) else stops:
            at = (text + piece).find(stop)
            if at >= 0:
                return (text + piece)[len(text) : max(at, len(text))], stop
        return piece, None

    def _note(self, token: fake_model.FakeToken, failure: str | None) -> None:
        record, steering = self._record, self._request.steering
        if record is None or steering is None:
            return
        self._engine.keep_record(record)
        record.num_tokens += 1
        if failure is not None:
            record.status, record.error = "failed", failure
        if steering.record:
            record.token_ids.append(token.id)
            record.base_logprobs.append(token.base_logprob)
            record.steered_logprobs.append(token.steered_logprob)
            record.adapter_logprobs = record.adapter_logprobs or [[] for _ in token.adapter_logprobs]
            for values, value in zip(record.adapter_logprobs, token.adapter_logprobs, strict=True):
                values.append(value)
            record.kl.append(fake_model.kl_of(token))
            record.flipped.append(token.is_steered)
            if steering.guidance is not None:
                record.negative_logprobs = [*(record.negative_logprobs or []), token.negative_logprob]
            if steering.num_alternatives is not None:
                at = fake_model.alternatives_of(token, steering)
                record.alternatives = [*(record.alternatives or []), at]

    def _delta(
        self,
        piece: str,
        token_ids: list[int],
        logprobs: list[float],
        finish: str | None,
        stop: str | None,
        prompt: list[int] | None,
        echoed: list[int],
    ) -> EngineDelta:
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "stop_reason": stop, "token_ids": token_ids}
        shown = [fake_model.token_text(token) for token in token_ids]
        if self._is_chat:
            choice["delta"] = {"content": piece}
            if self._logprobs_asked:
                num_top = self._request.body.get("top_logprobs", 0)
                choice["logprobs"] = {
                    "content": [
                        {
                            "token": token,
                            "logprob": value,
                            "bytes": list(token.encode()),
                            "top_logprobs": [{"token": token, "logprob": value, "bytes": None}] if num_top else [],
                        }
                        for token, value in zip(shown, logprobs, strict=True)
                    ]
                }
        else:
            choice["text"] = piece
            if self._logprobs_asked:
                choice["logprobs"] = self._legacy_logprobs(echoed, shown, logprobs)
        return EngineDelta(choice=choice, token_ids=token_ids, token_logprobs=logprobs, prompt_token_ids=prompt)

    def _legacy_logprobs(self, echoed: list[int], shown: list[str], logprobs: list[float]) -> dict[str, Any]:
        tokens = [*(fake_model.token_text(token) for token in echoed), *shown]
        values: list[float | None] = [*(None if i == 0 else -1.0 for i in range(len(echoed))), *logprobs]
        offsets, at = [], self._offset
        for token in tokens:
            offsets.append(at)
            at += len(token)
        self._offset = at
        top = [None if value is None else {token: value} for token, value in zip(tokens, values, strict=True)]
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}
