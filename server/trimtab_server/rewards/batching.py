"""A reward on the request path: its cache, its queue, its limits and its breaker around one model."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from trimtab_adapters.contract.errors import RewardChangedError, RewardError, RewardUnavailableError
from trimtab_adapters.contract.rewards import RewardInput
from trimtab_server.breaker import Breaker, BreakerState
from trimtab_server.rewards.attempts import AnyReward, AttemptObserver, GuardedModel, Scored, is_async
from trimtab_server.rewards.batch_queue import BatchQueue
from trimtab_server.rewards.limits import RewardLimits
from trimtab_server.rewards.score_cache import ScoreCache

_MAX_VERSIONS = 3


class RewardObserver(AttemptObserver, Protocol):
    """Is told of attempts and calls."""

    def call(self, reward: str, *, num_inputs: int, num_cached: int, duration_s: float) -> None:
        """A call was answered."""
        ...


@dataclass(frozen=True, slots=True)
class RewardState:
    """What an admin sees of a reward that is in use.

    Attributes:
        breaker: Whether it is asked at all.
        num_cached: Scores that are kept.
        num_cache_hits: Scores that were given from there so far.
    """

    breaker: BreakerState
    num_cached: int
    num_cache_hits: int


class BatchedReward:
    """One model behind a cache and a queue, within limits; an `AsyncReward`. Belongs to one event loop.

    Kinds that run in a thread have one batch at a time, and a call is never split. Calls of awaited kinds are split
    into batches of their own size, several of which run at a time.

    Args:
        model: The reward.
        limits: Of time, retries, sizes and cache.
        observer: Is told of attempts and calls.
    """

    def __init__(
        self, model: AnyReward, limits: RewardLimits | None = None, observer: RewardObserver | None = None
    ) -> None:
        self._model = model
        self._limits = limits or RewardLimits()
        self._observer = observer
        self._breaker = Breaker(
            f"the reward {model.name!r}",
            threshold=self._limits.breaker_threshold,
            cooldown_s=self._limits.breaker_cooldown_s,
            is_away=lambda exc: isinstance(exc, RewardUnavailableError),
            refusal=lambda message, wait_s: RewardUnavailableError(message, retry_after_s=wait_s, is_retriable=False),
        )
        self._cache = ScoreCache(max_size=self._limits.cache_size, ttl_s=self._limits.cache_ttl_s)
        guarded = GuardedModel(model, self._limits, self._breaker, observer)
        self._queue = BatchQueue(
            guarded.score,
            max_batch_size=self._limits.max_batch_size,
            max_concurrency=self._limits.max_concurrency if is_async(model) else 1,
        )

    @property
    def model(self) -> AnyReward:
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

    @property
    def state(self) -> RewardState:
        """What an admin sees of it."""
        return RewardState(self._breaker.state, len(self._cache), self._cache.num_hits)

    async def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        """One finite number per input, in order, all of one version.

        Raises:
            RewardError: One of them could not be computed, or not in time.
        """
        return (await self.scored(inputs)).scores

    async def scored(self, inputs: Sequence[RewardInput]) -> Scored:
        """The same, with the version that gave them. Raises `RewardError`."""
        if not inputs:
            return Scored(self.version, [])
        loop = asyncio.get_running_loop()
        started = loop.time()
        deadline_s = self._limits.deadline_s
        try:
            async with asyncio.timeout(deadline_s):
                scored, num_cached = await self._look_up_or_score(inputs)
        except TimeoutError as exc:
            raise RewardUnavailableError(
                f"the reward {self.name!r} did not answer within {deadline_s:g} s", is_retriable=False
            ) from exc
        if self._observer is not None:
            self._observer.call(
                self.name, num_inputs=len(inputs), num_cached=num_cached, duration_s=loop.time() - started
            )
        return scored

    async def _look_up_or_score(self, inputs: Sequence[RewardInput]) -> tuple[Scored, int]:
        for _ in range(_MAX_VERSIONS):
            version = self.version
            known = self._cache.find(version, inputs)
            missing = [item for item in inputs if item not in known]
            if not missing:
                return Scored(version, [known[item] for item in inputs]), len(known)
            self._breaker.check()
            scored = await self._score_missing(missing, inputs)
            found = dict(zip(missing, scored.scores, strict=True))
            self._cache.keep(scored.version, found)
            if scored.version == version or not known:  # Else what was known is of an old version.
                found |= known
                return Scored(scored.version, [found[item] for item in inputs]), len(known)
        raise self._changed()

    async def _score_missing(self, missing: list[RewardInput], inputs: Sequence[RewardInput]) -> Scored:
        try:
            return await self._score_in_pieces(missing)
        except (RewardUnavailableError, RewardChangedError):
            raise
        except RewardError:
            if len(missing) == len(inputs):
                raise
        # Once more with every input, so that the position in the error message is the caller's own.
        scored = await self._score_in_pieces(inputs)
        by_input = dict(zip(inputs, scored.scores, strict=True))
        return Scored(scored.version, [by_input[item] for item in missing])

    async def _score_in_pieces(self, inputs: Sequence[RewardInput]) -> Scored:
        size = self._limits.max_batch_size
        if len(inputs) <= size or not is_async(self._model):
            return await self._queue.put(inputs)
        tasks = [asyncio.create_task(self._put_piece(inputs, at, size)) for at in range(0, len(inputs), size)]
        try:
            pieces = await asyncio.gather(*tasks)
        finally:
            # After a failure the others are of no use.
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if len({piece.version for piece in pieces}) > 1:
            raise self._changed()
        return Scored(pieces[0].version, [score for piece in pieces for score in piece.scores])

    async def _put_piece(self, inputs: Sequence[RewardInput], start: int, size: int) -> Scored:
        piece = inputs[start : start + size]
        try:
            return await self._queue.put(piece)
        except (RewardUnavailableError, RewardChangedError):
            raise
        except RewardError as exc:
            where = f"{start + 1}" if len(piece) == 1 else f"{start + 1} to {start + len(piece)}"
            raise RewardError(f"{exc.message} (this is of outputs {where} of {len(inputs)})") from exc

    def _changed(self) -> RewardChangedError:
        return RewardChangedError(f"the reward {self.name!r} changed its version while outputs were scored; ask again")
