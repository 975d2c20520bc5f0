"""Batches the score calls of concurrent requests for one reward and keeps them off the event loop."""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from trimtab_adapters.contract.errors import RewardError
from trimtab_adapters.contract.rewards import RewardInput, RewardModel, check_scores

MAX_BATCH_SIZE = 64
TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True, eq=False)
class _ScoreCall:
    """One caller's inputs and where it waits for the scores."""

    inputs: tuple[RewardInput, ...]
    scores: asyncio.Future[list[float]]


class BatchedReward:
    """One reward model behind a queue: at most one batch runs at a time, in a worker thread.

    A batch is what has been queued while the one before it ran; an idle reward starts at once. Equal inputs of a batch
    are scored once. When a batch fails, each of its calls is run again alone, so that a bad input fails only the
    caller who sent it. Belongs to one event loop.

    Args:
        model: The reward.
        max_batch_size: Most inputs of a batch of several calls. A single call with more inputs is not split: memory
            is the model's own concern.
        timeout_s: How long a call may take, waiting included. A thread cannot be stopped, so a reward that hangs
            answers later calls only with this error until it returns.
    """

    def __init__(
        self, model: RewardModel, *, max_batch_size: int = MAX_BATCH_SIZE, timeout_s: float = TIMEOUT_S
    ) -> None:
        self._model = model
        self._max_batch_size = max_batch_size
        self._timeout_s = timeout_s
        self._queue: deque[_ScoreCall] = deque()
        self._worker: asyncio.Task[None] | None = None

    @property
    def model(self) -> RewardModel:
        """The reward itself."""
        return self._model

    @property
    def name(self) -> str:
        """The name that routes and jobs use."""
        return self._model.name

    @property
    def version(self) -> str:
        """Changes whenever scores could change."""
        return self._model.version

    async def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        """One finite number per input, in order.

        Raises:
            RewardError: One of them could not be computed, or not in time.
        """
        if not inputs:
            return []
        call = _ScoreCall(tuple(inputs), asyncio.get_running_loop().create_future())
        self._queue.append(call)
        if self._worker is None:
            self._worker = asyncio.create_task(self._drain())
        try:
            async with asyncio.timeout(self._timeout_s):
                return await call.scores
        except TimeoutError as exc:
            raise RewardError(f"the reward {self.name!r} did not answer within {self._timeout_s:g} s") from exc

    async def _drain(self) -> None:
        batch: list[_ScoreCall] = []
        try:
            while batch := self._next_batch():
                await self._run(batch)
        finally:
            self._worker = None
            # Reached with calls left only when the loop is shutting down and this task was cancelled.
            for call in (*batch, *self._queue):
                call.scores.cancel()
            self._queue.clear()

    def _next_batch(self) -> list[_ScoreCall]:
        batch: list[_ScoreCall] = []
        size = 0
        while self._queue and (not batch or size + len(self._queue[0].inputs) <= self._max_batch_size):
            call = self._queue.popleft()
            if not call.scores.done():  # Its caller may have gone.
                batch.append(call)
                size += len(call.inputs)
        return batch

    async def _run(self, batch: list[_ScoreCall]) -> None:
        inputs = [item for call in batch for item in call.inputs]
        distinct = list(dict.fromkeys(inputs))
        result = await asyncio.to_thread(_score, self._model, distinct)
        if not isinstance(result, RewardError):
            scores = dict(zip(distinct, result, strict=True))
            for call in batch:
                _answer(call, [scores[item] for item in call.inputs])
        elif len(batch) == 1 and len(distinct) == len(inputs):
            _answer(batch[0], result)
        else:
            # Alone and with every input, so that the position in an error message is the caller's own.
            for call in batch:
                if not call.scores.done():
                    _answer(call, await asyncio.to_thread(_score, self._model, call.inputs))


def _answer(call: _ScoreCall, result: list[float] | RewardError) -> None:
    if call.scores.done():
        return
    if isinstance(result, RewardError):
        call.scores.set_exception(result)
    else:
        call.scores.set_result(result)


def _score(model: RewardModel, inputs: Sequence[RewardInput]) -> list[float] | RewardError:
    """Run the model; what goes wrong comes back as a value, so that a batch can be taken apart."""
    try:
        return check_scores(model.name, model.score(inputs), len(inputs))
    except RewardError as exc:
        return exc
    # A reward is foreign code. Whatever it raises, SystemExit included, is its callers' error and must neither end the
    # queue nor, by way of the event loop, the server.
    except (Exception, SystemExit) as exc:  # noqa: BLE001
        error = RewardError(f"the reward {model.name!r} raised {type(exc).__name__}")
        error.__cause__ = exc
        return error
