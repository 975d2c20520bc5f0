"""From a job to its answer: pin the versions, generate the candidates, rank them, log the rollouts."""

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from trimtab_adapters.contract.errors import (
    AdapterError,
    AdapterMemoryFullError,
    EngineDiedError,
    EngineError,
    EngineRequestError,
    SteeringError,
    StorageError,
)
from trimtab_server.decoding.abandoned_records import AbandonedRecords
from trimtab_server.decoding.candidates import Selection, Selector
from trimtab_server.decoding.explanations import ExplainedDelta, Explainer
from trimtab_server.decoding.fanout import MergedStream, generate_all
from trimtab_server.decoding.job import GenerationJob, JobResult, PromptResult
from trimtab_server.decoding.logprobs import checked_record
from trimtab_server.decoding.reference_draw import BaseReferenceDraw
from trimtab_server.decoding.rollouts import rollouts_of
from trimtab_server.engine.base import Candidate, Engine, EngineDelta, EngineRequest
from trimtab_server.engine.candidate_builder import CandidateBuilder
from trimtab_server.engine.residency import Residency
from trimtab_server.settings import RolloutMode
from trimtab_server.storage.base import RolloutLog

logger = logging.getLogger(__name__)


class Generator:
    """Answers jobs.

    Args:
        engine: Where candidates are generated.
        residency: Holds adapter versions in the engine.
        selector: Ranks candidates.
        rollout_log: Where rollouts go; not used when `mode` is `off`.
        mode: In `durable` mode a failing log fails the request; in `async` mode it is logged as an error.
        explainer: Explains the choices of jobs that ask for it.
        abandoned: Gets the candidates whose records nobody will take.
    """

    def __init__(
        self,
        engine: Engine,
        residency: Residency,
        selector: Selector,
        rollout_log: RolloutLog,
        mode: RolloutMode,
        explainer: Explainer,
        abandoned: AbandonedRecords,
    ) -> None:
        self._engine = engine
        self._residency = residency
        self._selector = selector
        self._rollout_log = rollout_log
        self._mode = mode
        self._explainer = explainer
        self.abandoned = abandoned

    @property
    def is_logging(self) -> bool:
        """Whether rollouts are logged at all."""
        return self._mode != "off"

    async def complete(self, job: GenerationJob) -> JobResult:
        """Generate, rank and log all candidates of a job. Cancelling aborts the engine's work."""
        requests = [job.request(p, c) for p in range(len(job.prompts)) for c in range(job.num_candidates)]
        try:
            prompts = await self._answered(job, requests)
        except BaseException:
            self.abandoned.forget(requests)
            raise
        return await self.finished(job, prompts)

    async def _answered(self, job: GenerationJob, requests: Sequence[EngineRequest]) -> list[PromptResult]:
        with self.watching():
            async with self._residency.pin(weight.version for weight in job.active_adapters):
                candidates = await generate_all(self._engine, requests)
            for i, candidate in enumerate(candidates):
                candidate.index = i % job.num_candidates
            await self.attach_records(job, candidates)
            prompts = await self._rank(job, candidates)
            if job.explains:
                chosen = [selection.candidate for prompt in prompts for selection in prompt.selections[: job.n]]
                await self._explainer.explain(job, chosen)
        return prompts

    def stream(self, job: GenerationJob) -> "JobStream":
        """Answer a job piece by piece; every candidate is a choice."""
        return JobStream(self, self._engine, self._residency, self._explainer, job)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, by the engine's tokenizer."""
        return str((await self._engine.post("/detokenize", {"tokens": list(token_ids)}))["prompt"])

    async def attach_records(self, job: GenerationJob, candidates: Sequence[Candidate]) -> None:
        """Fetch and check the records of candidates that were asked for and are not there yet."""
        if not job.record:
            return
        due = {c.steering.uid: c for c in candidates if c.steering is not None and c.record is None}
        if due:
            records = await self._engine.take_records(list(due))
            for uid, candidate in due.items():
                candidate.record = checked_record(candidate, records.get(uid))

    async def finished(self, job: GenerationJob, prompts: list[PromptResult]) -> JobResult:
        """Log the rollouts; the answer must not be complete before this returns."""
        result = JobResult(job=job, prompts=prompts, completed_at=time.time())
        if self.is_logging:
            try:
                await self._rollout_log.append(rollouts_of(result))
            except StorageError:
                if self._mode == "durable":
                    raise
                logger.exception("the rollouts of %s are lost", job.id)
        return result

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Tell the residency when the engine behaves as if it had lost versions, and whose fault an error is."""
        try:
            yield
        except AdapterError as exc:
            # The caller named a registered version; that the engine cannot use it is not the request's fault.
            raise SteeringError(f"An adapter version of this request cannot be used: {exc.message}") from exc
        except AdapterMemoryFullError:
            raise  # nothing is wrong with the engine
        except (EngineError, SteeringError) as exc:
            if not isinstance(exc, EngineRequestError) or exc.engine_status in (400, 404) or exc.engine_status >= 500:
                self._residency.forget()
            raise

    async def _rank(self, job: GenerationJob, candidates: Sequence[Candidate]) -> list[PromptResult]:
        size = job.num_candidates
        groups = [candidates[i : i + size] for i in range(0, len(candidates), size)]
        if not job.is_ranked:
            return [in_order(group) for group in groups]
        try:
            async with asyncio.TaskGroup() as tasks:
                ranked = [tasks.create_task(self._rank_prompt(job, i, group)) for i, group in enumerate(groups)]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in ranked]

    async def _rank_prompt(self, job: GenerationJob, index: int, candidates: Sequence[Candidate]) -> PromptResult:
        prompt_token_ids = candidates[0].prompt_token_ids
        text = job.prompts[index].text
        if text is None:
            text = await self.detokenize(prompt_token_ids) if job.reward is not None else ""
        draw = BaseReferenceDraw(self._engine, job, index)
        selections = await self._selector.select(
            prompt=text,
            prompt_token_ids=prompt_token_ids,
            candidates=candidates,
            n=job.n,
            reward=job.reward,
            draw_reference=draw,
            calibration_size=job.calibration_size,
        )
        return PromptResult(selections=selections, references=draw.drawn)


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """A piece of one choice of a streamed answer.

    Attributes:
        index: Of the choice in the answer.
        prompt_index: Of its prompt.
        delta: The engine's piece.
        is_first: Whether it is the first piece of its choice.
        is_last: Whether it is the last piece of the whole answer.
        num_tokens: Tokens of this choice up to here.
        num_prompt_tokens: Tokens of its prompt.
        explanation: Of the tokens of the piece, where it was asked for.
        candidate: Complete, on the piece that ends its choice.
    """

    index: int
    prompt_index: int
    delta: EngineDelta
    is_first: bool
    is_last: bool
    num_tokens: int
    num_prompt_tokens: int
    explanation: dict[str, Any] | None
    candidate: Candidate | None


class JobStream:
    """A streamed job. `start()` returns when the first delta is there, so that an error before it keeps its status."""

    def __init__(
        self, generator: Generator, engine: Engine, residency: Residency, explainer: Explainer, job: GenerationJob
    ) -> None:
        self._generator = generator
        self._engine = engine
        self._residency = residency
        self._explainer = explainer
        self._job = job
        self._pins = AsyncExitStack()
        self._merged: MergedStream[ExplainedDelta] | None = None
        self._builders: list[CandidateBuilder] = []
        self._candidates: dict[int, Candidate] = {}
        self._seen: set[int] = set()
        self._ahead: tuple[int, ExplainedDelta] | None = None
        self._untaken: list[EngineRequest] = []

    async def start(self) -> None:
        """Pin the versions and wait for the first delta. Call `aclose` in the end, also when this fails."""
        job = self._job
        requests = [job.request(p, c) for p in range(len(job.prompts)) for c in range(job.num_candidates)]
        with self._generator.watching():
            await self._pins.enter_async_context(self._residency.pin(w.version for w in job.active_adapters))
            self._builders = [
                CandidateBuilder(request, self._engine.name, index=i % job.num_candidates)
                for i, request in enumerate(requests)
            ]
            self._untaken = requests
            self._merged = MergedStream(partial(self._explainer.stream, job), requests)
            self._ahead = await self._merged.next()

    def __aiter__(self) -> "JobStream":
        return self

    async def __anext__(self) -> ChoiceDelta:
        """The next piece of any choice. Raises the error of the first candidate that fails, after stopping the rest."""
        while True:
            item = await self._next()
            if item is None:
                if len(self._candidates) < len(self._builders):
                    raise EngineDiedError("the engine ended its answer without saying why")
                await self._pins.aclose()
                raise StopAsyncIteration
            index, piece = item
            builder = self._builders[index]
            builder.add(piece.delta)
            if piece.delta.choice:  # else it only brought the usage
                return await self._choice_delta(index, piece, builder)

    async def result(self) -> JobResult:
        """After the last piece: check the records, log the rollouts."""
        job, size = self._job, self._job.num_candidates
        for index, candidate in self._candidates.items():
            candidate.usage = self._builders[index].candidate().usage  # came after the last piece
        candidates = [self._candidates[i] for i in sorted(self._candidates)]
        with self._generator.watching():
            await self._generator.attach_records(job, candidates)
        self._untaken = []
        prompts = [in_order(candidates[i : i + size]) for i in range(0, len(candidates), size)]
        return await self._generator.finished(job, prompts)

    async def aclose(self) -> None:
        """Abort what still runs and let the versions go."""
        self._generator.abandoned.forget(self._untaken)
        self._untaken = []
        if self._merged is not None:
            await self._merged.aclose()
        await self._pins.aclose()

    async def _next(self) -> tuple[int, ExplainedDelta] | None:
        assert self._merged is not None, "start() comes first"
        if self._ahead is not None:
            item, self._ahead = self._ahead, None
            return item
        with self._generator.watching():
            return await self._merged.next()

    async def _choice_delta(self, index: int, piece: ExplainedDelta, builder: CandidateBuilder) -> ChoiceDelta:
        candidate, delta = None, piece.delta
        if delta.choice.get("finish_reason") is not None:
            candidate = self._candidates[index] = builder.candidate()
            if self._job.steering_logprobs:
                with self._generator.watching():
                    await self._generator.attach_records(self._job, [candidate])
        is_first = index not in self._seen
        self._seen.add(index)
        return ChoiceDelta(
            index=index,
            prompt_index=index // self._job.num_candidates,
            delta=delta,
            is_first=is_first,
            is_last=candidate is not None and len(self._candidates) == len(self._builders),
            num_tokens=len(builder.token_ids),
            num_prompt_tokens=len(builder.prompt_token_ids),
            explanation=piece.explanation,
            candidate=candidate,
        )


def in_order(candidates: Sequence[Candidate]) -> PromptResult:
    """Candidates as they were asked for, unranked."""
    return PromptResult([Selection(c, None, i, len(candidates)) for i, c in enumerate(candidates)])
