"""A base model that runs in the gateway's own process, in transformers: for what vLLM does not run.

That is the papers' Blenderbot, an encoder-decoder model, or any other. Adapter LMs run beside it, the same formula puts
both together, and the token is sampled here. Rows are computed one after another, so it is slower than vLLM, and slower
still with several requests at once.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Generic, TypeVar

from trimtab_adapters.contract.engine_api import EngineStatus, LoadedVersion, RetireReply
from trimtab_adapters.contract.params import VersionId
from trimtab_adapters.contract.records import SteeringRecord
from trimtab_adapters.contract.sampling import ContextLimits
from trimtab_server.engine.answer_text import AnswerText, Tokenizer
from trimtab_server.engine.answer_writer import AnswerWriter
from trimtab_server.engine.base import Candidate, EngineDelta, EngineRequest
from trimtab_server.engine.base_kinds import transformers_kind
from trimtab_server.engine.candidate_builder import CandidateBuilder
from trimtab_server.engine.candidate_slots import CandidateSlots
from trimtab_server.engine.sampling_request import RequestReader
from trimtab_server.engine.steerer import Steerer, commit_version, prepare_version

S = TypeVar("S")


class TransformersEngine(Generic[S]):
    """An `Engine` over a base that the steerer runs itself.

    Args:
        steerer: Runs base and adapter LMs.
        tokenizer: The base's.
        model: Where the base was loaded from.
        limits: How long prompt and answer may be.
        has_encoder: Whether the base reads prompts with an encoder.
        vocabulary_sha256: Fingerprint of the tokenizer's vocabulary.
        name: For logs, metrics and rollouts.
        max_concurrent: Candidates at the same time; more wait here.
    """

    def __init__(
        self,
        steerer: Steerer[S],
        tokenizer: Tokenizer,
        *,
        model: str,
        limits: ContextLimits,
        has_encoder: bool,
        vocabulary_sha256: str,
        name: str = "transformers",
        max_concurrent: int = 1024,
    ) -> None:
        self._steerer = steerer
        self._tokenizer = tokenizer
        self._model = model
        self._limits = limits
        self._has_encoder = has_encoder
        self._vocabulary_sha256 = vocabulary_sha256
        self._name = name
        self._boot_id = uuid.uuid4().hex
        self._reader = RequestReader(tokenizer, limits, transformers_kind(has_encoder=has_encoder))
        self._slots = CandidateSlots(max_concurrent)

    @property
    def name(self) -> str:
        """For logs, metrics and rollouts."""
        return self._name

    async def status(self) -> EngineStatus:
        """What is loaded."""
        status = await self._steerer.status()
        return EngineStatus(
            boot_id=self._boot_id,
            kind="transformers",
            vllm_version="",
            runner="none",
            model=self._model,
            max_model_len=self._limits.total,
            max_output_len=self._limits.output if self._has_encoder else None,
            vocab_size=self._tokenizer.num_tokens,
            vocabulary_sha256=self._vocabulary_sha256,
            num_tokens=self._tokenizer.num_tokens,
            versions=status.versions,
            cache=status.cache,
            weights=status.weights,
            steered_rows=status.steered_rows,
            steered_steps=status.steered_steps,
            failed_rows=status.failed_rows,
        )

    async def generate(self, request: EngineRequest) -> Candidate:
        """Generate one candidate."""
        builder = CandidateBuilder(request, self._name)
        async with aclosing(self.stream(request)) as deltas:
            async for delta in deltas:
                builder.add(delta)
        return builder.candidate()

    async def generate_group(self, requests: Sequence[EngineRequest]) -> list[Candidate]:
        """Candidates of one prompt, which an encoder reads once for all of them."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self.generate(request)) for request in requests]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def stream(self, request: EngineRequest) -> AsyncGenerator[EngineDelta, None]:
        """Generate one candidate piece by piece; the last delta has only `usage` and an empty `choice`."""
        asked = await asyncio.to_thread(self._reader.read, request)
        writer = AnswerWriter(request, asked.prompt_token_ids, self._tokenizer, asked.rules.num_top)
        text = AnswerText(self._tokenizer, asked)
        params = request.steering if request.steering is not None and request.steering.needs_row else None
        async with self._slots.taken(1):
            session = await self._steerer.open(params, asked.prompt_token_ids, asked.rules, num_begun=asked.num_begun)
            try:
                for _ in range(asked.max_tokens):
                    token = await self._steerer.step(session)
                    piece = text.push(token.token_id)
                    if (opening := writer.opening()) is not None:
                        yield opening
                    yield writer.delta(piece, [token])
                    if piece.finish_reason is not None:
                        break
            finally:
                self._steerer.close(session)
        yield writer.usage()

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
        """End the thread of base and steering."""
        self._steerer.aclose()
