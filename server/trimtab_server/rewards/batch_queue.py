"""Gathers what concurrent callers want scored into batches."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from trimtab_adapters.contract.errors import RewardChangedError, RewardError, RewardUnavailableError
from trimtab_adapters.contract.rewards import RewardInput
from trimtab_server.rewards.attempts import Scored

ScoreBatch = Callable[[Sequence[RewardInput]], Awaitable[Scored]]


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """Inputs of one caller, and where it waits for their scores."""

    inputs: tuple[RewardInput, ...]
    scored: asyncio.Future[Scored]


class BatchQueue:
    """Pieces of work in the order of their arrival; a batch is what was queued while the ones before it ran.

    An idle queue starts at once. Equal inputs of a batch are scored once. When a batch fails because of what is in it,
    each of its pieces is run again alone, so that a bad input fails only the caller who sent it; when it fails because
    the reward is away, all of them fail. Belongs to one event loop.

    Args:
        score: Scores a batch.
        max_batch_size: Most inputs of a batch of several pieces. A single piece with more is not split.
        max_concurrency: Most batches at a time.
    """

    def __init__(self, score: ScoreBatch, *, max_batch_size: int, max_concurrency: int) -> None:
        self._score = score
        self._max_batch_size = max_batch_size
        self._max_concurrency = max_concurrency
        self._waiting: deque[_Piece] = deque()
        self._workers: set[asyncio.Task[None]] = set()

    async def put(self, inputs: Sequence[RewardInput]) -> Scored:
        """Wait for the scores of one piece. A caller who leaves is not scored, unless its batch runs already.

        Raises:
            RewardError: See `ScoreBatch`.
        """
        piece = _Piece(tuple(inputs), asyncio.get_running_loop().create_future())
        self._waiting.append(piece)
        if len(self._workers) < self._max_concurrency:
            self._workers.add(asyncio.create_task(self._drain()))
        return await piece.scored

    async def _drain(self) -> None:
        batch: list[_Piece] = []
        try:
            while batch := self._next_batch():
                await self._run(batch)
        except BaseException:
            # The loop is shutting down, or this is a fault of our own; nobody may wait for it in vain.
            for piece in (*batch, *self._waiting):
                piece.scored.cancel()
            self._waiting.clear()
            raise
        finally:
            # In the same step in which the queue was found empty: whatever is put in later starts a new worker.
            self._workers.discard(asyncio.current_task())

    def _next_batch(self) -> list[_Piece]:
        batch: list[_Piece] = []
        size = 0
        while self._waiting and (not batch or size + len(self._waiting[0].inputs) <= self._max_batch_size):
            piece = self._waiting.popleft()
            if not piece.scored.done():  # Its caller may have gone.
                batch.append(piece)
                size += len(piece.inputs)
        return batch

    async def _run(self, batch: list[_Piece]) -> None:
        inputs = [item for piece in batch for item in piece.inputs]
        distinct = list(dict.fromkeys(inputs))
        result = await self._try(distinct)
        if isinstance(result, Scored):
            by_input = dict(zip(distinct, result.scores, strict=True))
            for piece in batch:
                _answer(piece, Scored(result.version, [by_input[item] for item in piece.inputs]))
        elif _is_of_content(result) and (len(batch) > 1 or len(distinct) < len(inputs)):
            # Alone and with every input, so that the position in an error message is the caller's own.
            for piece in batch:
                if not piece.scored.done():
                    _answer(piece, await self._try(piece.inputs))
        else:
            for piece in batch:
                _answer(piece, result)

    async def _try(self, inputs: Sequence[RewardInput]) -> Scored | RewardError:
        """The scores, or what went wrong as a value, so that a batch can be taken apart."""
        try:
            return await self._score(inputs)
        except RewardError as exc:
            return exc


def _is_of_content(error: RewardError) -> bool:
    return not isinstance(error, RewardUnavailableError | RewardChangedError)


def _answer(piece: _Piece, result: Scored | RewardError) -> None:
    if piece.scored.done():
        return
    if isinstance(result, RewardError):
        piece.scored.set_exception(result)
    else:
        piece.scored.set_result(result)
