"""The steering core without vLLM: one thread, one batch of rows at a time, whoever waits for a token.

The base is behind somebody else's API, so that rows come when its answers come, or a LM of transformers on this same
thread. All rows that wait while a step runs are in the next one together. Everything of torch happens on this thread.
"""

import asyncio
import logging
import threading
import uuid
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from trimtab_adapters.contract.engine_api import LoadedVersion, RetireReply
from trimtab_adapters.contract.errors import EngineError, EngineRequestError, SteeringError
from trimtab_adapters.contract.params import SteeringParams, VersionId
from trimtab_adapters.contract.records import SteeringRecord
from trimtab_adapters.contract.sampling import SampledToken, SamplingRules, SteeringStatus, TopLogprobs, UnseenTokens
from trimtab_adapters.in_process.sampling import base_row, constrained, sample
from trimtab_adapters.in_process.transformers_base import BaseRow, TransformersBase
from trimtab_adapters.record_buffer import RecordBuffer
from trimtab_adapters.residents import BaseModel, Residents
from trimtab_adapters.steered_row import SteeredRow
from trimtab_adapters.steering import SteeringCore, StepResult

__all__ = ["BaseModel", "Session", "Stepper"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_POLL_S = 0.005
"""Pause between two questions how a version's loading goes, as in the engine's routes."""


@dataclass(slots=True, eq=False)
class Session:
    """One answer in the making, as the stepper knows it; a handle for callers.

    Attributes:
        row: Its tokens and terms; steered by nothing when the request wants no steering.
        rules: How it is sampled.
        is_recorded: Whether somebody will take its record.
        base: What the base has read, where it runs here.
    """

    row: SteeredRow
    rules: SamplingRules
    is_recorded: bool
    base: BaseRow | None = None
    counts: Counter[int] = field(default_factory=Counter)
    dice: np.random.Generator = field(default_factory=np.random.default_rng)
    is_closed: bool = False


@dataclass(frozen=True, slots=True)
class _Step:
    session: Session
    top: TopLogprobs | None
    future: "Future[SampledToken]"


@dataclass(frozen=True, slots=True)
class _Call:
    function: Callable[[], Any]
    future: "Future[Any]"


_Work = SimpleQueue[_Step | _Call | None]


class Stepper:
    """Steers and samples answers of a base behind an API, or of one that runs on the stepper's thread.

    The thread starts with the object and ends with it, or with `aclose`.

    Args:
        base: What adapters must fit; `vocab_size` is the number of the tokenizer's tokens.
        lm: The base itself; None when an API shows its distributions, which are then given to `step`.
        unseen: What becomes of tokens that the API does not show.
        kv_bytes: Budget of the adapters' KV cache.
        weight_bytes: Budget of their weights; None means no bound.
        device: Where adapters run.
    """

    def __init__(
        self,
        base: BaseModel,
        *,
        lm: TransformersBase | None = None,
        unseen: UnseenTokens = "exclude",
        kv_bytes: int,
        weight_bytes: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        residents = Residents(base, device or torch.device("cpu"), kv_bytes=kv_bytes, weight_bytes=weight_bytes)
        self._worker = _Worker(residents, lm, unseen)
        self._work: _Work = SimpleQueue()
        threading.Thread(target=_serve, args=(self._work, self._worker), name="steering", daemon=True).start()
        self._end = weakref.finalize(self, self._work.put, None)

    def aclose(self) -> None:
        """End the thread when its work is done."""
        self._end()

    async def status(self) -> SteeringStatus:
        """What is loaded."""
        return await self._run(self._worker.status)

    async def open(
        self,
        params: SteeringParams | None,
        prompt_token_ids: Sequence[int],
        rules: SamplingRules,
        *,
        num_begun: int = 0,
    ) -> Session:
        """Begin an answer; its adapters read the prompt. `close` it in the end.

        Args:
            params: None steers by nothing.
            prompt_token_ids: At least one.
            rules: How the answer is sampled.
            num_begun: How many ids at the end of the prompt are the answer so far, which an encoder does not read.

        Raises:
            SteeringError: It cannot be steered as asked.
        """
        future: Future[Session] = Future()
        self._work.put(_Call(lambda: self._worker.open(params, prompt_token_ids, rules, num_begun), future))
        try:
            session = await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            # Whether or not it was opened already: nobody else could close it.
            future.add_done_callback(lambda done: self._close_opened(done))
            raise
        if session.row.error is not None:
            reason = session.row.error
            self.close(session)
            raise SteeringError(f"Steering of this request failed: {reason}")
        return session

    def _close_opened(self, future: "Future[Session]") -> None:
        if not future.cancelled() and future.exception() is None:
            self.close(future.result())

    def close(self, session: Session) -> None:
        """Let go of what an answer holds."""
        self._work.put(_Call(lambda: self._worker.close(session), Future()))

    async def step(self, session: Session, top: TopLogprobs | None = None) -> SampledToken:
        """Steer the base's next-token distribution and sample the answer's next token.

        Args:
            session: The answer.
            top: What an API showed of that distribution; None when the base runs here.

        Raises:
            SteeringError: Steering failed; there is no token.
            EngineError: The base failed.
            EngineRequestError: The constraints of the request leave none of the tokens.
        """
        future: Future[SampledToken] = Future()
        self._work.put(_Step(session, top, future))
        return await asyncio.wrap_future(future)

    async def take_records(self, uids: Sequence[str]) -> dict[str, SteeringRecord]:
        """Remove and return the records of finished candidates."""
        records = await self._run(lambda: self._worker.records.take(uids))
        return {record.uid: record for record in records}

    async def read_records(self, starts: Mapping[str, int]) -> dict[str, SteeringRecord]:
        """Records so far, each from a token on; they stay."""
        records = await self._run(lambda: self._worker.records.read(starts))
        return {record.uid: record for record in records}

    async def prepare(self, version: VersionId, path: str) -> LoadedVersion:
        """Load and validate a version; the state in which that ended."""
        residents = self._worker.residents
        await self._run(lambda: residents.prepare(version, path))
        while True:
            state = await self._run(lambda: residents.poll(version))
            if state.state != "loading":
                return state
            await asyncio.sleep(_POLL_S)

    async def commit(self, version: VersionId) -> LoadedVersion:
        """Make a prepared version usable, between two steps. Raises `ConflictError` and `NotFoundError`."""
        return await self._run(lambda: self._worker.residents.commit(version))

    async def retire(self, version: VersionId) -> RetireReply:
        """Refuse new rows for a version and free it with its last row."""
        num_rows = await self._run(lambda: self._worker.residents.retire(version))
        return RetireReply(version=version, freed=num_rows == 0, active_rows=num_rows)

    async def _run(self, function: Callable[[], T]) -> T:
        future: Future[T] = Future()
        self._work.put(_Call(function, future))
        return await asyncio.wrap_future(future)


class _Worker:
    """What the thread owns."""

    def __init__(self, residents: Residents, lm: TransformersBase | None, unseen: UnseenTokens) -> None:
        self.residents = residents
        self._lm = lm
        self.core = SteeringCore(residents.committed, vocab_size=residents.base.vocab_size)
        self.records = RecordBuffer()
        self._unseen: UnseenTokens = unseen

    def status(self) -> SteeringStatus:
        residents, core = self.residents, self.core
        return SteeringStatus(
            versions=residents.versions(),
            cache=residents.cache_status(),
            weights=residents.weight_status(),
            steered_rows=core.num_rows,
            steered_steps=core.num_steps,
            failed_rows=core.num_failed,
        )

    def open(
        self, params: SteeringParams | None, prompt_token_ids: Sequence[int], rules: SamplingRules, num_begun: int
    ) -> Session:
        own = params or SteeringParams(uid=f"unsteered-{uuid.uuid4().hex}", adapters=[])
        row = self.core.open(own, prompt_token_ids, ())
        base = None if self._lm is None else self._lm.open(len(prompt_token_ids) - num_begun)
        session = Session(row, rules, is_recorded=params is not None, base=base)
        if rules.seed is not None:
            session.dice = np.random.default_rng(rules.seed % 2**64)
        # While the base reads the prompt too. Its last token is computed with the first step, which needs its logits.
        self.core.prefill([(row, len(prompt_token_ids) - 1)])
        return session

    def close(self, session: Session) -> None:
        if session.is_closed:
            return
        session.is_closed = True
        self.core.close(session.row)
        if not session.is_recorded:
            self.records.take([session.row.params.uid])
        self.residents.sweep()

    def step(self, steps: Sequence[_Step]) -> None:
        """All rows that wait, in one batch. Whatever goes wrong reaches its caller."""
        due: list[_Step] = []
        rows: list[Tensor] = []
        for step in steps:
            if step.session.is_closed or not step.future.set_running_or_notify_cancel():
                continue
            try:
                row = self._base(step)
            except Exception as exc:  # boundary: the thread must live
                logger.exception("the base gave no distribution; its request fails")
                step.future.set_exception(EngineError(f"The base model failed: internal error ({type(exc).__name__})"))
                continue
            if not bool(torch.isfinite(row).any()):
                step.future.set_exception(_nothing_left())
                continue
            due.append(step)
            rows.append(row)
        if due:
            self._steer(due, torch.stack(rows))

    def _base(self, step: _Step) -> Tensor:
        session = step.session
        if self._lm is not None and session.base is not None:
            row = self._lm.next_logits(session.base, session.row.tokens)
        elif step.top is not None:
            row = base_row(step.top, self.residents.base.vocab_size, self._unseen)
        else:
            raise TypeError("neither a base nor what an API shows of one")
        return constrained(row, session.rules, session.row.num_output_tokens)

    def _steer(self, steps: Sequence[_Step], logits: Tensor) -> None:
        rows = [(step.session.row, index) for index, step in enumerate(steps)]
        sampled: dict[int, int] = {}
        try:
            result = self.core.step(rows, logits)
            assert result is not None, "there are rows"
            tokens = torch.zeros(len(steps), dtype=torch.long)
            for index in result.indices.tolist():
                session = steps[index].session
                tokens[index] = sampled[index] = sample(
                    logits[index], session.rules, session.counts, float(session.dice.random())
                )
            self.records.observe(result, tokens)
        except Exception as exc:  # boundary: the thread must live
            logger.exception("a steering step failed; its rows fail")
            for row, _ in rows:
                row.error = row.error or f"internal error in a steering step: {type(exc).__name__}"
            for step in steps:
                step.future.set_exception(_failed(step.session.row))
            return
        self._answer(steps, result, sampled)

    def _answer(self, steps: Sequence[_Step], result: StepResult, sampled: Mapping[int, int]) -> None:
        for row, index in result.failed:
            steps[index].future.set_exception(_failed(row))
        for place, index in enumerate(result.indices.tolist()):
            step, token_id = steps[index], sampled[index]
            logprobs = result.steered_logprobs[place]
            step.session.row.append([token_id])
            step.session.counts[token_id] += 1
            answer = SampledToken(token_id, float(logprobs[token_id]), _most_probable(logprobs, step))
            step.future.set_result(answer)


def _most_probable(logprobs: Tensor, step: _Step) -> list[tuple[int, float]]:
    if not step.session.rules.num_top:
        return []
    top = logprobs.topk(min(step.session.rules.num_top, len(logprobs)))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [(token_id, logprob) for token_id, logprob in pairs if logprob > float("-inf")]


def _failed(row: SteeredRow) -> SteeringError:
    return SteeringError(f"Steering of this request failed: {row.error}")


def _nothing_left() -> EngineRequestError:
    return EngineRequestError(
        "The constraints of this request (logit_bias, allowed_token_ids, min_tokens) leave none of the tokens that the "
        "base shows; ask for fewer constraints.",
        engine_status=400,
    )


@torch.inference_mode()
def _serve(work: _Work, worker: _Worker) -> None:
    """The thread."""
    while True:
        items = [work.get()]
        try:
            while True:
                items.append(work.get_nowait())
        except Empty:
            pass
        steps: list[_Step] = []
        for item in items:
            if isinstance(item, _Step):
                steps.append(item)
            elif item is not None:
                _call(item)
        worker.step(steps)
        if None in items:
            return


def _call(call: _Call) -> None:
    if not call.future.set_running_or_notify_cancel():
        return
    try:
        call.future.set_result(call.function())
    except Exception as exc:  # noqa: BLE001 - not swallowed: whoever waits gets it
        call.future.set_exception(exc)
