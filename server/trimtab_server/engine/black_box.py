"""A base model behind somebody else's API, steered in the gateway's own process: the papers' GPT-3 case.

Every token of a steered answer is one call that shows the base's most probable next tokens; the adapter LMs read the
same text here, both are combined by the same formula as in the engine, and the token is sampled here. So the provider
learns the text and nothing of the adapters, and bills the whole prompt for each token. Unsteered answers are one call.
"""

import asyncio
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from cachetools import TTLCache

from trimtab_adapters.contract.engine_api import EngineStatus, LoadedVersion, RetireReply
from trimtab_adapters.contract.errors import EngineError
from trimtab_adapters.contract.params import VersionId
from trimtab_adapters.contract.records import SteeringRecord
from trimtab_adapters.contract.sampling import ContextLimits, UnseenTokens
from trimtab_server.engine.answer_text import AnswerText, Tokenizer
from trimtab_server.engine.answer_writer import AnswerWriter
from trimtab_server.engine.base import Candidate, EngineDelta, EngineRequest
from trimtab_server.engine.base_kinds import Api, black_box_kind
from trimtab_server.engine.black_box_answer import Position, WholePiece, read_piece, read_positions
from trimtab_server.engine.black_box_cost import Cost, cost_of
from trimtab_server.engine.black_box_provider import Provider
from trimtab_server.engine.black_box_tokens import TokenMap
from trimtab_server.engine.candidate_builder import CandidateBuilder
from trimtab_server.engine.candidate_slots import CandidateSlots
from trimtab_server.engine.sampling_request import RequestReader, SamplingRequest
from trimtab_server.engine.steerer import Steerer, commit_version, prepare_version

S = TypeVar("S")

FIRST_KEPT_S = 5.0
"""How long the base's distribution after a prompt is remembered, so that the candidates of a request, which all begin
with the same question, pay for it once. Not for long, because nobody tells when the base has changed."""

_MAX_FIRST = 256


@dataclass(frozen=True, slots=True)
class BlackBoxOptions:
    """How the provider is asked.

    Attributes:
        api: What it understands.
        prompt: Whether it is sent token ids or text.
        num_top: k, how many of the most probable tokens it is asked for.
        lookahead: Tokens of one call. The provider goes on by itself with its most probable ones; as long as the
            steered answer has the same, their distributions save calls.
        max_model_len: Most tokens of prompt and answer together.
        unseen: What becomes of tokens that it does not show.
    """

    api: Api = "openai"
    prompt: str = "token_ids"
    num_top: int = 20
    lookahead: int = 1
    max_model_len: int = 4096
    unseen: UnseenTokens = "exclude"


@dataclass(frozen=True, slots=True)
class _Shown:
    """What one call showed, and its price, which the first answer that uses it takes."""

    positions: Sequence[Position]
    cost: Cost


class BlackBoxEngine(Generic[S]):
    """An `Engine` over a provider.

    Args:
        provider: The API.
        steerer: Runs the adapter LMs.
        tokenizer: The base's.
        options: How the provider is asked.
        vocabulary_sha256: Fingerprint of the tokenizer's vocabulary.
        name: For logs, metrics and rollouts.
        max_concurrent: Candidates at the same time; more wait here.
        clock: Seconds.
    """

    def __init__(
        self,
        provider: Provider,
        steerer: Steerer[S],
        tokenizer: Tokenizer,
        options: BlackBoxOptions,
        *,
        vocabulary_sha256: str,
        name: str = "black-box",
        max_concurrent: int = 1024,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._provider = provider
        self._steerer = steerer
        self._tokenizer = tokenizer
        self._options = options
        self._vocabulary_sha256 = vocabulary_sha256
        self._name = name
        self._boot_id = uuid.uuid4().hex
        self._tokens = TokenMap(tokenizer.token_bytes(), tokenizer.vocabulary)
        self._reader = RequestReader(
            tokenizer, ContextLimits.shared(options.max_model_len), black_box_kind(options.api, options.unseen)
        )
        self._automatic = tokenizer.encode("", add_special_tokens=True)
        self._slots = CandidateSlots(max_concurrent)
        self._first: TTLCache[tuple[int, ...], asyncio.Task[_Shown]] = TTLCache(_MAX_FIRST, FIRST_KEPT_S, clock)

    @property
    def name(self) -> str:
        """For logs, metrics and rollouts."""
        return self._name

    async def status(self) -> EngineStatus:
        """What is loaded. Raises `EngineUnavailableError` while the provider does not answer."""
        await self._provider.check()
        status = await self._steerer.status()
        return EngineStatus(
            boot_id=self._boot_id,
            kind="black_box",
            vllm_version="",
            runner="none",
            model=self._provider.identity,
            max_model_len=self._options.max_model_len,
            vocab_size=self._tokenizer.num_tokens,
            vocabulary_sha256=self._vocabulary_sha256,
            num_tokens=self._tokenizer.num_tokens,
            versions=status.versions,
            cache=status.cache,
            weights=status.weights,
            steered_rows=status.steered_rows,
            steered_steps=status.steered_steps,
            failed_rows=status.failed_rows,
            provider=self._provider.status,
        )

    async def generate(self, request: EngineRequest) -> Candidate:
        """Generate one candidate."""
        (candidate,) = await self.generate_group([request])
        return candidate

    async def generate_group(self, requests: Sequence[EngineRequest]) -> list[Candidate]:
        """Unsteered candidates are choices of one call, where that gives each its seed; others come one by one."""
        asked = await self._read(requests[0])
        is_seeded = "seed" in requests[0].body and self._options.api != "vllm"  # vLLM gives choice i the seed + i
        if asked.passed_on is not None and (len(requests) == 1 or not is_seeded):
            return await self._whole(requests, asked)
        if len(requests) == 1:
            return [await self._collected(requests[0])]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self.generate(request)) for request in requests]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _collected(self, request: EngineRequest) -> Candidate:
        builder = CandidateBuilder(request, self._name)
        async with aclosing(self.stream(request)) as deltas:
            async for delta in deltas:
                builder.add(delta)
        return builder.candidate()

    async def _whole(self, requests: Sequence[EngineRequest], asked: SamplingRequest) -> list[Candidate]:
        """Candidates that the provider samples by itself, in one call."""

        def read(data: dict[str, Any]) -> list[WholePiece]:
            choices = sorted(data["choices"], key=lambda choice: int(choice.get("index", 0)))
            if len(choices) != len(requests):
                raise ValueError(f"{len(choices)} of {len(requests)} choices")
            return [read_piece(choice, self._tokens, asked.rules.num_top) for choice in choices]

        body = self._whole_body(asked) | ({"n": len(requests)} if len(requests) > 1 else {})
        async with self._slots.taken(len(requests)):
            started = time.perf_counter()
            pieces, cost = await self._provider.complete(body, read)
        candidates = []
        for request, piece in zip(requests, pieces, strict=True):
            builder, writer = CandidateBuilder(request, self._name), self._writer(request, asked)
            builder.add(writer.delta(piece.text, piece.tokens))
            builder.add(writer.usage(cost.take()))  # billed once: the first has it all
            candidates.append(builder.candidate())
            candidates[-1].duration_s = time.perf_counter() - started
        return candidates

    async def stream(self, request: EngineRequest) -> AsyncGenerator[EngineDelta, None]:
        """Generate one candidate piece by piece; the last delta has only `usage` and an empty `choice`."""
        asked = await self._read(request)
        deltas = self._steered(request, asked) if asked.passed_on is None else self._streamed(request, asked)
        async with self._slots.taken(1), aclosing(deltas):
            async for delta in deltas:
                yield delta

    async def _streamed(self, request: EngineRequest, asked: SamplingRequest) -> AsyncGenerator[EngineDelta, None]:
        """An answer that the provider samples by itself."""
        writer, cost = self._writer(request, asked), Cost()
        async with aclosing(self._provider.stream(self._whole_body(asked))) as chunks:
            async for chunk in chunks:
                if chunk.get("usage"):
                    cost = cost_of(chunk["usage"])
                for choice in chunk.get("choices") or ():
                    try:
                        piece = read_piece(choice, self._tokens, asked.rules.num_top)
                    except (ValueError, TypeError, KeyError) as exc:
                        raise EngineError(f"the black box's answer has an unexpected form: {exc}") from exc
                    if (opening := writer.opening()) is not None:
                        yield opening
                    yield writer.delta(piece.text, piece.tokens)
        yield writer.usage(cost)

    async def _steered(self, request: EngineRequest, asked: SamplingRequest) -> AsyncGenerator[EngineDelta, None]:
        """An answer that is sampled here, token by token."""
        params = request.steering if request.steering is not None and request.steering.needs_row else None
        writer, text, cost = self._writer(request, asked), AnswerText(self._tokenizer, asked), Cost()
        tokens, ahead = list(asked.prompt_token_ids), deque[Position]()
        session = await self._steerer.open(params, asked.prompt_token_ids, asked.rules)
        try:
            for num_left in range(asked.max_tokens, 0, -1):
                if not ahead:
                    num_wanted = min(self._options.lookahead, num_left)
                    is_first = num_left == asked.max_tokens
                    shown = await (self._ask_first(tokens, num_wanted) if is_first else self._ask(tokens, num_wanted))
                    cost.add(shown.cost.take())
                    ahead.extend(shown.positions)
                position = ahead.popleft()
                cost.unmapped_tokens += position.shown.num_unmapped
                token = await self._steerer.step(session, position.shown.top)
                tokens.append(token.token_id)
                if token.token_id != position.drawn:
                    ahead.clear()
                piece = text.push(token.token_id)
                if (opening := writer.opening()) is not None:
                    yield opening
                yield writer.delta(piece, [token], cost)
                if piece.finish_reason is not None:
                    break
        finally:
            self._steerer.close(session)
        yield writer.usage(cost)

    async def _ask_first(self, token_ids: Sequence[int], num_tokens: int) -> _Shown:
        """As `_ask`, shared with everybody who asks the same now or asked it a moment ago."""
        question = (num_tokens, *token_ids)
        task = self._first.get(question)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._first[question] = asyncio.create_task(self._ask(list(token_ids), num_tokens))
            task.add_done_callback(_look)
        return await asyncio.shield(task)

    async def _ask(self, token_ids: Sequence[int], num_tokens: int) -> _Shown:
        """The base's next-token distributions after some tokens; several when the provider goes on by itself."""
        options = self._options
        body = {
            "prompt": self._prompt(token_ids),
            "max_tokens": num_tokens,
            # Some APIs show probabilities after temperature, so the only one that changes nothing. With several tokens
            # in a call the most probable ones are wanted, and such APIs cannot be used.
            "temperature": 1.0 if num_tokens == 1 else 0.0,
            "top_p": 1.0,
            "logprobs": options.num_top,
            **self._ids_wanted(),
        }

        def read(data: dict[str, Any]) -> list[Position]:
            return read_positions(data, self._tokens, options.num_top, reads_drawn=num_tokens > 1)

        positions, cost = await self._provider.complete(body, read)
        cost.resplit_calls = int(cost.prompt_tokens not in (0, cost.calls * len(token_ids)))
        num_unmapped = sum(position.shown.num_unmapped for position in positions)
        self._provider.count(Cost(unmapped_tokens=num_unmapped, resplit_calls=cost.resplit_calls))
        return _Shown(positions, cost)

    def _whole_body(self, asked: SamplingRequest) -> dict[str, Any]:
        return {
            **(asked.passed_on or {}),
            "prompt": self._prompt(asked.prompt_token_ids),
            "max_tokens": asked.max_tokens,
            "logprobs": asked.rules.num_top,
            **self._ids_wanted(),
        }

    def _ids_wanted(self) -> dict[str, Any]:
        return {"return_tokens_as_token_ids": True} if self._options.api == "vllm" else {}

    def _prompt(self, token_ids: Sequence[int]) -> list[int] | str:
        """A prompt as the provider takes it. Its own tokenizer adds to a text what ours would."""
        if self._options.prompt == "token_ids":
            return list(token_ids)
        num_own = len(self._automatic) if list(token_ids[: len(self._automatic)]) == self._automatic else 0
        return self._tokenizer.decode(token_ids[num_own:], skip_special_tokens=False)

    def _writer(self, request: EngineRequest, asked: SamplingRequest) -> AnswerWriter:
        restriction = {"unseen": self._options.unseen, "top_logprobs": self._options.num_top}
        is_whole = asked.passed_on is not None
        prompt, num_top = asked.prompt_token_ids, asked.rules.num_top
        return AnswerWriter(request, prompt, self._tokenizer, num_top, None if is_whole else restriction)

    async def _read(self, request: EngineRequest) -> SamplingRequest:
        """In a thread: tokenising a long prompt takes its time."""
        return await asyncio.to_thread(self._reader.read, request)

    async def take_records(self, uids: Sequence[str]) -> dict[str, SteeringRecord]:
        """The records of finished candidates, by uid; each can be taken once."""
        return await self._steerer.take_records(uids)

    async def read_records(self, starts: Mapping[str, int]) -> dict[str, SteeringRecord]:
        """What was recorded so far of running candidates, which stays."""
        return await self._steerer.read_records(starts)

    async def prepare(self, version: VersionId, path: str) -> LoadedVersion:
        """Load and validate a version. Raises `AdapterError`, or `AdapterMemoryFullError`."""
        return await prepare_version(self._steerer, version, path)

    async def commit(self, version: VersionId) -> LoadedVersion:
        """Make a prepared version usable, between two steps."""
        return await commit_version(self._steerer, version)

    async def retire(self, version: VersionId) -> RetireReply:
        """Refuse new rows for a version and free it with the last row that uses it."""
        return await self._steerer.retire(version)

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """`/tokenize` and `/detokenize` as vLLM has them."""
        return await self._reader.post(path, body)

    async def aclose(self) -> None:
        """Close the connections and end the steering's thread."""
        await self._provider.aclose()
        self._steerer.aclose()


def _look(task: asyncio.Task[_Shown]) -> None:
    """Look at a task's error even if everybody who waited for it has gone."""
    if not task.cancelled():
        task.exception()
