"""From a job to its answer: pin the versions, generate the candidates, rank them, log the rollouts."""

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from trimtab_adapters.contract.errors import (
    AdapterError,
    AdapterMemoryFullError,
    EngineError,
    EngineRequestError,
    SteeringError,
    StorageError,
)
from trimtab_adapters.contract.selection import Blockwise
from trimtab_server.decoding.abandoned_records import AbandonedRecords
from trimtab_server.decoding.choice_delta import in_order
from trimtab_server.decoding.explanations import Explainer
from trimtab_server.decoding.fanout import generate_all
from trimtab_server.decoding.job import GenerationJob, JobResult, PromptResult
from trimtab_server.decoding.logprobs import checked_record
from trimtab_server.decoding.prompt_run import PromptRun
from trimtab_server.decoding.rollouts import rollouts_of
from trimtab_server.decoding.scoring import Scoring
from trimtab_server.decoding.strategies import Emit, select
from trimtab_server.engine.base import Candidate, Engine
from trimtab_server.engine.residency import Residency
from trimtab_server.settings import RolloutMode
from trimtab_server.storage.base import RolloutLog

logger = logging.getLogger(__name__)


class CapWarnings(Protocol):
    """What is known of over-optimisation, see `trimtab_server.overoptimization`."""

    async def warning(self, reward_name_at_version: str, base_model: str, num_candidates: int) -> str | None:
        """What to tell a caller who chooses among so many candidates by this reward; None when there is nothing."""
        ...


class Generator:
    """Answers jobs.

    Args:
        engine: Where candidates are generated.
        residency: Holds adapter versions in the engine.
        scoring: Scores candidates.
        rollout_log: Where rollouts go; not used when `mode` is `off`.
        mode: In `durable` mode a failing log fails the request; in `async` mode it is logged as an error.
        explainer: Explains the choices of jobs that ask for it.
        abandoned: Gets the candidates whose records nobody will take.
        caps: Knows beyond how many candidates a reward was found to mislead.
    """

    def __init__(
        self,
        engine: Engine,
        residency: Residency,
        scoring: Scoring,
        rollout_log: RolloutLog,
        mode: RolloutMode,
        explainer: Explainer,
        abandoned: AbandonedRecords,
        caps: CapWarnings | None = None,
    ) -> None:
        self.engine = engine
        self.residency = residency
        self._scoring = scoring
        self._rollout_log = rollout_log
        self._mode = mode
        self.explainer = explainer
        self.abandoned = abandoned
        self._caps = caps

    @property
    def is_logging(self) -> bool:
        """Whether rollouts are logged at all."""
        return self._mode != "off"

    async def complete(self, job: GenerationJob, emit: Emit | None = None) -> JobResult:
        """Generate, choose and log all candidates of a job. Cancelling aborts the engine's work.

        Args:
            job: The request.
            emit: Takes the pieces of an answer that is decided piece by piece.
        """
        with self.watching():
            async with self.residency.pin(weight.version for weight in job.active_adapters):
                prompts = await (self._plain(job) if job.selection is None else self._selected(job, emit))
            if job.explains:
                chosen = [selection.candidate for prompt in prompts for selection in prompt.selections[: job.n]]
                await self.explainer.explain(job, chosen)
        return await self.finished(job, prompts)

    async def _plain(self, job: GenerationJob) -> list[PromptResult]:
        """Every candidate is a choice."""
        size = job.num_candidates
        requests = [job.request(p, c) for p in range(len(job.prompts)) for c in range(size)]
        try:
            candidates = await generate_all(self.engine, requests)
            for i, candidate in enumerate(candidates):
                candidate.index = i % size
            await self.attach_records(job, candidates)
        except BaseException:
            self.abandoned.forget(requests)
            raise
        return [in_order(candidates[i : i + size]) for i in range(0, len(candidates), size)]

    async def _selected(self, job: GenerationJob, emit: Emit | None) -> list[PromptResult]:
        """The choices are found by the strategy that the request names, for all prompts at the same time."""
        for reward in job.rewards:
            await self._scoring.check(reward)
        runs = [
            PromptRun(self.engine, self._scoring, self.abandoned, self.detokenize, job, index)
            for index in range(len(job.prompts))
        ]
        taken: list[str] = []
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(select(run, emit)) for run in runs]
            prompts = [task.result() for task in tasks]
            taken += await self._attach_selected(job, prompts)
            await self._warn(job, prompts)
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            for run in runs:
                await run.aclose()
                run.forget(taken)
        return prompts

    async def _warn(self, job: GenerationJob, prompts: Sequence[PromptResult]) -> None:
        """Tell a caller who chooses among more candidates than are known to be good for anything."""
        for prompt in prompts:
            value = prompt.selections[0].reward
            if value is None or self._caps is None:
                continue
            num = job.num_candidates if isinstance(job.selection, Blockwise) else len(prompt.selections)
            name = f"{value.name}@{value.version}"
            if (warning := await self._caps.warning(name, job.resolved.base_model, num)) is not None:
                prompt.outcome["warnings"] = [warning]

    async def _attach_selected(self, job: GenerationJob, prompts: Sequence[PromptResult]) -> list[str]:
        """Take the records of candidates that came to their end; read those of the stopped, which may still grow."""
        selections = [selection for prompt in prompts for selection in prompt.selections]
        ended = [s.candidate for s in selections if s.state != "stopped"]
        await self.attach_records(job, ended)
        stopped = {
            s.candidate.steering.uid: s.candidate
            for s in selections
            if s.state == "stopped" and s.candidate.record is None and s.candidate.steering and s.candidate.token_ids
        }
        if job.record and stopped:
            records = await self.engine.read_records(dict.fromkeys(stopped, 0))
            for uid, candidate in stopped.items():
                candidate.record = checked_record(candidate, records.get(uid))
        return [candidate.steering.uid for candidate in ended if candidate.steering is not None]

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, by the engine's tokenizer."""
        return str((await self.engine.post("/detokenize", {"tokens": list(token_ids)}))["prompt"])

    async def attach_records(self, job: GenerationJob, candidates: Sequence[Candidate]) -> None:
        """Fetch and check the records of candidates that were asked for and are not there yet."""
        if not job.record:
            return
        due = {c.steering.uid: c for c in candidates if c.steering is not None and c.record is None}
        if due:
            records = await self.engine.take_records(list(due))
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
                self.residency.forget()
            raise
