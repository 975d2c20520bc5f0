"""Scores of reference rollouts, prompt by prompt: kept where known, from the log where logged, drawn where missing."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from trimtab_adapters.contract.calibration import ReferenceScores, prompt_key
from trimtab_adapters.contract.errors import EngineError, InvalidRequestError, StorageError
from trimtab_adapters.contract.rewards import RewardInput
from trimtab_server.decoding.candidates import ReferenceDraw
from trimtab_server.decoding.part_scores import parts_key, score_parts
from trimtab_server.rewards.resolved import ResolvedReward
from trimtab_server.storage.base import CalibratorStore, LoggedSample, SampleLog

logger = logging.getLogger(__name__)

DEFAULT_SIZE = 16
"""K: the standard error of a calibrated reward is at most 0.125, enough to rank by its identity transform."""

MAX_KEPT = 4096


@dataclass(frozen=True, slots=True)
class CalibratorKey:
    """What the scores hold for: one prompt, the rewards at one version each, one reference policy."""

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
        self._kept: OrderedDict[CalibratorKey, ReferenceScores] = OrderedDict()

    async def get(self, prompt_key: str, reward: str, reference: str) -> ReferenceScores | None:
        """`reward` is `name@version`, of a mix all of them; `reference` is the reference policy's key."""
        key = CalibratorKey(prompt_key, reward, reference)
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    async def put(self, prompt_key: str, calibrator: ReferenceScores) -> None:
        """Replace what was kept for the same prompt, reward and reference."""
        key = CalibratorKey(prompt_key, calibrator.reward, calibrator.reference)
        self._kept[key] = calibrator
        self._kept.move_to_end(key)
        while len(self._kept) > self._max_size:
            self._kept.popitem(last=False)


@dataclass(slots=True)
class _Fit:
    """A calibrator in the making and how many callers wait for it."""

    task: asyncio.Task[ReferenceScores]
    num_waiting: int = 0


class ReferenceCalibrators:
    """Finds or makes the reference scores of a prompt.

    Looks in memory, then in the store, then in the log, and draws what is missing. Callers who ask for the same scores
    at the same time share one draw; it is cancelled when the last of them has gone. A failure reaches all of them and
    is not kept.

    What is kept and what is logged is never added up: rollouts that were drawn here are in both. The larger of the two
    is taken and the rest is drawn.

    Args:
        store: Keeps scores over restarts.
        samples: Logged samples of the reference policy; None leaves the log out.
        default_size: K where the caller does not say.
        max_kept: Of how many prompts to hold the scores in memory.
    """

    def __init__(
        self,
        store: CalibratorStore,
        samples: SampleLog | None = None,
        *,
        default_size: int = DEFAULT_SIZE,
        max_kept: int = MAX_KEPT,
    ) -> None:
        if default_size < 1:
            raise ValueError("default_size must be at least 1")
        self._memory = MemoryCalibratorStore(max_kept)
        self._store = store
        self._samples = samples
        self._default_size = default_size
        self._fits: dict[CalibratorKey, _Fit] = {}

    async def get(
        self,
        *,
        prompt: str,
        prompt_token_ids: Sequence[int],
        reward: ResolvedReward,
        draw_reference: ReferenceDraw,
        reference: str | None = None,
        size: int | None = None,
    ) -> ReferenceScores:
        """Scores of at least `size` reference rollouts; only what is missing is drawn.

        Args:
            prompt: The prompt as text, for the reward.
            prompt_token_ids: The prompt as the engine sees it.
            reward: Scores the rollouts, by each of its parts; how these are combined makes no difference here.
            draw_reference: Draws them; all draws of one `key` must be independent of each other.
            reference: The reference policy's key where it says more than that of `draw_reference`.
            size: K >= 1; None means the default.

        Raises:
            EngineError: The rollouts could not be drawn.
            RewardError: One of them could not be scored.
            StorageError: The store could not be read.
        """
        size = self._default_size if size is None else size
        if size < 1:
            raise InvalidRequestError("the calibration size must be at least 1", param="calibration.size")
        key = CalibratorKey(prompt_key(prompt_token_ids, prompt), parts_key(reward), reference or draw_reference.key)
        while True:
            known = await self._memory.get(key.prompt_key, key.reward, key.reference)
            if known is not None and known.size >= size:
                return known
            fit = self._fits.get(key)
            if fit is None:
                fit = _Fit(asyncio.create_task(self._fit(key, prompt, prompt_token_ids, reward, draw_reference, size)))
                self._fits[key] = fit
                fit.task.add_done_callback(partial(self._finish, key, fit))
            # One in the making may be smaller than what is asked for here; then the loop draws the rest.
            calibrator = await self._wait(key, fit)
            if calibrator.size >= size:
                return calibrator

    async def _wait(self, key: CalibratorKey, fit: _Fit) -> ReferenceScores:
        fit.num_waiting += 1
        try:
            return await asyncio.shield(fit.task)
        finally:
            fit.num_waiting -= 1
            if fit.num_waiting == 0 and not fit.task.done():
                # Forgotten at once: whoever asks from now on must not join a task that is being cancelled.
                self._forget(key, fit)
                fit.task.cancel()

    def _finish(self, key: CalibratorKey, fit: _Fit, task: asyncio.Task[ReferenceScores]) -> None:
        self._forget(key, fit)
        if not task.cancelled():
            task.exception()  # Marks it as seen: everyone who waited for it may have gone.

    def _forget(self, key: CalibratorKey, fit: _Fit) -> None:
        if self._fits.get(key) is fit:
            del self._fits[key]

    async def _fit(
        self,
        key: CalibratorKey,
        prompt: str,
        prompt_token_ids: Sequence[int],
        reward: ResolvedReward,
        draw_reference: ReferenceDraw,
        size: int,
    ) -> ReferenceScores:
        known = await self._memory.get(key.prompt_key, key.reward, key.reference)
        if known is None:
            known = await self._store.get(key.prompt_key, key.reward, key.reference)
        num_known = known.size if known is not None else 0
        if known is not None and num_known >= size:
            await self._memory.put(key.prompt_key, known)
            return known
        logged = await self._logged(key, prompt_token_ids, size)
        rows: list[Sequence[float]] = []
        if len(logged) > num_known:
            rows += await score_logged(reward, prompt, logged)
        elif known is not None:
            rows += known.rows
        if (num_missing := size - len(rows)) > 0:
            rollouts = await draw_reference(num_missing)
            if len(rollouts) < num_missing:
                raise EngineError(f"the engine gave {len(rollouts)} of {num_missing} reference rollouts")
            rows += await score_parts(reward, [RewardInput(prompt=prompt, output=rollout.text) for rollout in rollouts])
        scores = ReferenceScores.fit(rows, reference=key.reference, reward=key.reward)
        await self._keep(key, scores)
        return scores

    async def _logged(self, key: CalibratorKey, prompt_token_ids: Sequence[int], size: int) -> Sequence[LoggedSample]:
        if self._samples is None:
            return ()
        try:
            return await self._samples.of_prompt(key.reference, prompt_token_ids, limit=size)
        except StorageError as exc:
            # The log only spares the draw.
            logger.warning("logged samples of the reference policy were not read: %s", exc.message)
            return ()

    async def _keep(self, key: CalibratorKey, scores: ReferenceScores) -> None:
        await self._memory.put(key.prompt_key, scores)
        try:
            await self._store.put(key.prompt_key, scores)
        except StorageError as exc:
            # The calibrator is good and in memory; the store only spares a later process the draw.
            logger.warning("a calibrator of the reward %r was not stored: %s", key.reward, exc.message)


async def score_logged(reward: ResolvedReward, prompt: str, samples: Sequence[LoggedSample]) -> list[tuple[float, ...]]:
    """Scores of logged samples: those that are logged of the same versions for the same text, the rest anew."""
    known = [_logged_row(reward, prompt, sample) for sample in samples]
    missing = [i for i, row in enumerate(known) if row is None]
    inputs = [RewardInput(prompt=prompt, output=samples[i].output_text) for i in missing]
    fresh = dict(zip(missing, await score_parts(reward, inputs), strict=True)) if missing else {}
    return [row if row is not None else fresh[i] for i, row in enumerate(known)]


def _logged_row(reward: ResolvedReward, prompt: str, sample: LoggedSample) -> tuple[float, ...] | None:
    if sample.prompt != prompt:  # a reward that reads the prompt may have read another text for the same ids
        return None
    values = [part for value in sample.rewards for part in (value.parts or [value])]
    scores = {(value.name, value.version): value.raw for value in values}
    row = [scores.get((part.name, part.version)) for part in reward.parts]
    return None if None in row else tuple(score for score in row if score is not None)
