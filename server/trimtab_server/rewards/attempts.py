"""One batch of one reward: in its thread or on the event loop, in time, tried again where that may help."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import iscoroutinefunction
from typing import Protocol, TypeGuard

import stamina

from trimtab_adapters.contract.errors import RewardChangedError, RewardError, RewardUnavailableError
from trimtab_adapters.contract.rewards import AsyncRewardModel, RewardInput, RewardModel, check_scores
from trimtab_server.breaker import Breaker
from trimtab_server.rewards.limits import RewardLimits
from trimtab_server.rewards.worker_thread import WorkerThread

logger = logging.getLogger(__name__)

MAX_BACKOFF_S = 5.0
"""Longest wait before another attempt. A server that asks for more is left to the caller, who is told how much."""

_FIRST_BACKOFF_S = 0.1
_JITTER_S = 0.1
_MAX_VERSIONS = 3

AnyReward = RewardModel | AsyncRewardModel


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores, one per input and in their order, all of one version."""

    version: str
    scores: list[float]


class AttemptObserver(Protocol):
    """Is told of attempts."""

    def attempt(self, reward: str, error: RewardError | None) -> None:
        """One has ended."""
        ...


def is_async(model: AnyReward) -> TypeGuard[AsyncRewardModel]:
    """Whether a reward is awaited; others run in a thread."""
    return iscoroutinefunction(model.score)


class GuardedModel:
    """Scores batches with one model, within the limits of its registration.

    A model that runs in a thread has one thread: where a batch ran over its time, the next waits until the thread is
    free, within its own time.

    Args:
        model: The reward.
        limits: Time, retries and the breaker's figures.
        breaker: Counts its attempts.
        observer: Is told of them.
    """

    def __init__(
        self, model: AnyReward, limits: RewardLimits, breaker: Breaker, observer: AttemptObserver | None = None
    ) -> None:
        self._model = model
        self._limits = limits
        self._breaker = breaker
        self._observer = observer
        self._thread = WorkerThread(f"reward-{model.name}")

    async def score(self, inputs: Sequence[RewardInput]) -> Scored:
        """One finite number per input.

        Raises:
            RewardUnavailableError: No attempt got an answer.
            RewardChangedError: It changed its version again and again.
            RewardError: Any of them could not be computed.
        """
        for _ in range(_MAX_VERSIONS):
            version = self._model.version
            try:
                return Scored(version, await self._with_retries(inputs))
            except RewardChangedError as exc:
                logger.warning("%s", exc.message)
                changed = exc
        raise changed

    async def _with_retries(self, inputs: Sequence[RewardInput]) -> list[float]:
        attempts = stamina.retry_context(
            on=_pause_after,
            attempts=self._limits.max_retries + 1,
            timeout=None,
            wait_initial=_FIRST_BACKOFF_S,
            wait_jitter=_JITTER_S,
            wait_max=MAX_BACKOFF_S,
        )
        async for attempt in attempts:
            with attempt, self._breaker.attempt():
                return await self._observed(inputs)
        raise AssertionError("stamina makes at least one attempt")

    async def _observed(self, inputs: Sequence[RewardInput]) -> list[float]:
        error: RewardError | None = None
        try:
            return await self._attempt(inputs)
        except RewardError as exc:
            error = exc
            raise
        finally:
            if self._observer is not None:
                self._observer.attempt(self._model.name, error)

    async def _attempt(self, inputs: Sequence[RewardInput]) -> list[float]:
        model, name, timeout_s = self._model, self._model.name, self._limits.timeout_s
        try:
            async with asyncio.timeout(timeout_s) as limit:
                scores = await (model.score(inputs) if is_async(model) else self._in_thread(model, inputs))
            return check_scores(name, scores, len(inputs))
        except RewardError:
            raise
        except asyncio.CancelledError as exc:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise
            raise RewardError(f"the reward {name!r} was cancelled by code of its own") from exc
        # A reward is foreign code. Whatever it raises, SystemExit included, is its callers' error and must neither end
        # the queue nor, by way of the event loop, the server.
        except (Exception, SystemExit) as exc:
            if isinstance(exc, TimeoutError) and limit.expired():
                raise RewardUnavailableError(
                    f"the reward {name!r} did not answer within {timeout_s:g} s", is_retriable=is_async(model)
                ) from exc
            raise RewardError(f"the reward {name!r} raised {type(exc).__name__}") from exc

    async def _in_thread(self, model: AnyReward, inputs: Sequence[RewardInput]) -> list[float]:
        outcome = await self._thread.run(lambda: _call(model, inputs))
        if isinstance(outcome, RewardError):
            raise outcome
        if isinstance(outcome, BaseException):
            raise RewardError(f"the reward {self._model.name!r} raised {type(outcome).__name__}") from outcome
        return outcome


def _call(model: AnyReward, inputs: Sequence[RewardInput]) -> list[float] | BaseException:
    """Run a model in its thread. What it raises is returned."""
    try:
        return list(model.score(inputs))  # type: ignore[arg-type]
    except (Exception, SystemExit) as exc:  # noqa: BLE001
        return exc


def _pause_after(exc: Exception) -> bool | float:
    """Whether to try again after an error, and when, if the reward said so; stamina's hook."""
    if not isinstance(exc, RewardUnavailableError) or not exc.is_retriable:
        return False
    if exc.retry_after_s is None:
        return True
    return exc.retry_after_s if exc.retry_after_s <= MAX_BACKOFF_S else False
