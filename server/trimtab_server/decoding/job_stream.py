"""A streamed job of which every candidate is a choice."""

from contextlib import AsyncExitStack
from functools import partial

from trimtab_adapters.contract.errors import EngineDiedError
from trimtab_server.decoding.choice_delta import ChoiceDelta, in_order
from trimtab_server.decoding.explanations import ExplainedDelta
from trimtab_server.decoding.fanout import MergedStream
from trimtab_server.decoding.generation import Generator
from trimtab_server.decoding.job import GenerationJob, JobResult
from trimtab_server.engine.base import Candidate, EngineRequest
from trimtab_server.engine.candidate_builder import CandidateBuilder


class JobStream:
    """A streamed job. `start()` returns when the first delta is there, so that an error before it keeps its status."""

    def __init__(self, generator: Generator, job: GenerationJob) -> None:
        self._generator = generator
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
            await self._pins.enter_async_context(self._generator.residency.pin(w.version for w in job.active_adapters))
            self._builders = [
                CandidateBuilder(request, self._generator.engine.name, index=i % job.num_candidates)
                for i, request in enumerate(requests)
            ]
            self._untaken = requests
            self._merged = MergedStream(partial(self._generator.explainer.stream, job), requests)
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
