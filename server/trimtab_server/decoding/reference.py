"""Per-prompt calibrators: kept where they are known, drawn from the reference policy where they are not."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from trimtab_adapters.contract.calibration import EmpiricalCalibrator, prompt_key
from trimtab_adapters.contract.errors import EngineError, InvalidRequestError, StorageError
from trimtab_adapters.contract.rewards import RewardInput
from trimtab_server.decoding.candidates import ReferenceDraw
from trimtab_server.rewards.resolved import AsyncReward
from trimtab_server.storage.base import CalibratorStore

logger = logging.getLogger(__name__)

DEFAULT_SIZE = 16
"""K: the standard error of a calibrated reward is at most 0.125, enough to rank by its identity transform."""

MAX_KEPT = 4096


@dataclass(frozen=True, slots=True)
class CalibratorKey:
    """What a calibrator holds for: one prompt, one reward at one version, one reference policy."""

    prompt_key: str
    reward: str
    reference: str


class MemoryCalibratorStore:
    """The most recently used calibrators, in memory. A `CalibratorStore`.

    Args:
        max_size: How many to keep; the least recently used goes first.
    """

    def __init__(self, max_size: int = MAX_KEPT) -> None:
        self._max_size = max_size
        self._kept: OrderedDict[CalibratorKey, EmpiricalCalibrator] = OrderedDict()

    async def get(self, prompt_key: str, reward: str, reference: str) -> EmpiricalCalibrator | None:
        """`reward` is `name@version`; `reference` identifies base, steering and sampling settings."""
        key = CalibratorKey(prompt_key, reward, reference)
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    async def put(self, prompt_key: str, calibrator: EmpiricalCalibrator) -> None:
        """Replace what was kept for the same prompt, reward and reference."""
        key = CalibratorKey(prompt_key, calibrator.reward, calibrator.reference)
        self._kept[key] = calibrator
        self._kept.move_to_end(key)
        while len(self._kept) > self._max_size:
            self._kept.popitem(last=False)


@dataclass(slots=True)
class _Fit:
    """A calibrator in the making and how many callers wait for it."""

    task: asyncio.Task[EmpiricalCalibrator]
    num_waiting: int = 0


class ReferenceCalibrators:
    """Finds or makes the calibrator of a prompt.

    Looks in memory, then in the store, and draws what is missing. Callers who ask for the same calibrator at the same
    time share one draw; it is cancelled when the last of them has gone. A failure reaches all of them and is not kept.

    Args:
        store: Keeps calibrators over restarts.
        default_size: K where the caller does not say.
        max_kept: How many calibrators to hold in memory.
    """

    def __init__(self, store: CalibratorStore, *, default_size: int = DEFAULT_SIZE, max_kept: int = MAX_KEPT) -> None:
        if default_size < 1:
            raise ValueError("default_size must be at least 1")
        self._memory = MemoryCalibratorStore(max_kept)
        self._store = store
        self._default_size = default_size
        self._fits: dict[CalibratorKey, _Fit] = {}

    async def get(
        self,
        *,
        prompt: str,
        prompt_token_ids: Sequence[int],
        reward: AsyncReward,
        draw_reference: ReferenceDraw,
        size: int | None = None,
    ) -> EmpiricalCalibrator:
        """A calibrator of at least `size` reference rollouts; only what is missing is drawn.

        Args:
            prompt: The prompt as text, for the reward.
            prompt_token_ids: The prompt as the engine sees it.
            reward: Scores the rollouts.
            draw_reference: Draws them; all draws of one `key` must be independent of each other.
            size: K >= 1; None means the default.

        Raises:
            EngineError: The rollouts could not be drawn.
            RewardError: One of them could not be scored.
            StorageError: The store could not be read.
        """
        size = self._default_size if size is None else size
        if size < 1:
            raise InvalidRequestError("the calibration size must be at least 1", param="calibration_size")
        key = CalibratorKey(prompt_key(prompt_token_ids, prompt), f"{reward.name}@{reward.version}", draw_reference.key)
        while True:
            known = await self._memory.get(key.prompt_key, key.reward, key.reference)
            if known is not None and known.size >= size:
                return known
            fit = self._fits.get(key)
            if fit is None:
                fit = _Fit(asyncio.create_task(self._fit(key, prompt, reward, draw_reference, size)))
                self._fits[key] = fit
                fit.task.add_done_callback(partial(self._finish, key, fit))
            # One in the making may be smaller than what is asked for here; then the loop draws the rest.
            calibrator = await self._wait(key, fit)
            if calibrator.size >= size:
                return calibrator

    async def _wait(self, key: CalibratorKey, fit: _Fit) -> EmpiricalCalibrator:
        fit.num_waiting += 1
        try:
            return await asyncio.shield(fit.task)
        finally:
            fit.num_waiting -= 1
            if fit.num_waiting == 0 and not fit.task.done():
                # Forgotten at once: whoever asks from now on must not join a task that is being cancelled.
                self._forget(key, fit)
                fit.task.cancel()

    def _finish(self, key: CalibratorKey, fit: _Fit, task: asyncio.Task[EmpiricalCalibrator]) -> None:
        self._forget(key, fit)
        if not task.cancelled():
            task.exception()  # Marks it as seen: everyone who waited for it may have gone.

    def _forget(self, key: CalibratorKey, fit: _Fit) -> None:
        if self._fits.get(key) is fit:
            del self._fits[key]

    async def _fit(
        self, key: CalibratorKey, prompt: str, reward: AsyncReward, draw_reference: ReferenceDraw, size: int
    ) -> EmpiricalCalibrator:
        known = await self._memory.get(key.prompt_key, key.reward, key.reference)
        if known is None:
            known = await self._store.get(key.prompt_key, key.reward, key.reference)
        num_missing = size - (known.size if known is not None else 0)
        if known is not None and num_missing <= 0:
            await self._memory.put(key.prompt_key, known)
            return known
        rollouts = await draw_reference(num_missing)
        if len(rollouts) < num_missing:
            raise EngineError(f"the engine gave {len(rollouts)} of {num_missing} reference rollouts")
        scores = await reward.score([RewardInput(prompt=prompt, output=rollout.text) for rollout in rollouts])
        if known is not None:
            calibrator = known.extend(scores)
        else:
            calibrator = EmpiricalCalibrator.fit(scores, reference=key.reference, reward=key.reward)
        await self._memory.put(key.prompt_key, calibrator)
        try:
            await self._store.put(key.prompt_key, calibrator)
        except StorageError as exc:
            # The calibrator is good and in memory; the store only spares a later process the draw.
            logger.warning("a calibrator of the reward %r was not stored: %s", key.reward, exc.message)
        return calibrator
