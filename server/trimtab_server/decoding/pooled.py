"""Pooled calibrators on the request path: found, compared with what the request needs, applied."""

from collections.abc import Sequence
from dataclasses import dataclass

from trimtab_adapters.contract.errors import ConflictError, InvalidRequestError, NotFoundError
from trimtab_adapters.contract.pooled_calibration import PooledCalibrator
from trimtab_adapters.contract.records import RewardValue
from trimtab_adapters.contract.reference_policy import ReferencePolicy
from trimtab_adapters.contract.rewards import RewardInput
from trimtab_server.rewards.resolved import AsyncReward, ResolvedReward
from trimtab_server.storage.base import PooledCalibratorStore, StoredPooledCalibrator


@dataclass(frozen=True, slots=True)
class FoundCalibrator:
    """A pooled calibrator, and what it was made for that the request is not; nothing when it is fresh."""

    calibrator: PooledCalibrator
    differences: tuple[str, ...] = ()

    @property
    def is_stale(self) -> bool:
        """Whether it was made for something else."""
        return bool(self.differences)


def differences(calibrator: PooledCalibrator, reward: AsyncReward, policy: ReferencePolicy) -> tuple[str, ...]:
    """What a calibrator was made for that is not so now, each as `field: its value, not the one now`."""
    version = calibrator.reward.partition("@")[2]
    changed = [] if version == reward.version else [f"reward version: {version!r}, not {reward.version!r}"]
    return (*changed, *ReferencePolicy.from_key(calibrator.reference).differences(policy))


class PooledCalibrators:
    """Finds the pooled calibrator of a request.

    Args:
        store: Where they are kept.
    """

    def __init__(self, store: PooledCalibratorStore) -> None:
        self._store = store

    async def find(
        self, reward: ResolvedReward, policy: ReferencePolicy, *, calibrator_id: str | None, allow_stale: bool
    ) -> FoundCalibrator:
        """The named calibrator, or the newest of the reward that is fresh, or else the newest.

        Raises:
            InvalidRequestError: It is for another reward, or the reward is a mix.
            NotFoundError: There is none.
            ConflictError: It is stale and may not be used; the message says what differs.
        """
        if reward.combine is not None:
            raise InvalidRequestError(
                "A pooled calibrator is for one reward, not for a mix. Use the method 'reference'.",
                param="calibration.method",
            )
        (part,) = reward.parts
        candidates = await self._candidates(part, calibrator_id)
        checked = [(c.id, FoundCalibrator(c.calibrator, differences(c.calibrator, part, policy))) for c in candidates]
        found_id, found = next((item for item in checked if not item[1].is_stale), checked[0])
        if found.is_stale and not allow_stale:
            raise ConflictError(
                f"The calibrator {found_id} is stale: it was made for {'; '.join(found.differences)}. Fit a new one "
                "with `trimtab calibrate`, or set 'calibration.allow_stale' to use it all the same.",
                param="calibration",
                code="calibrator_stale",
            )
        return found

    async def _candidates(self, part: AsyncReward, calibrator_id: str | None) -> Sequence[StoredPooledCalibrator]:
        if calibrator_id is None:
            candidates = await self._store.of_reward(part.name)
            if not candidates:
                raise NotFoundError(
                    f"The reward {part.name!r} has no pooled calibrator; fit one with `trimtab calibrate`.",
                    param="calibration",
                    code="calibrator_not_found",
                )
            return candidates
        named = await self._store.get(calibrator_id)
        if named is None:
            raise NotFoundError(
                f"There is no calibrator {calibrator_id!r}.",
                param="calibration.calibrator",
                code="calibrator_not_found",
            )
        if named.reward_name != part.name:
            raise InvalidRequestError(
                f"The calibrator {calibrator_id} is for the reward {named.reward_name!r}, not for {part.name!r}.",
                param="calibration.calibrator",
            )
        return [named]


class PooledScorer:
    """Calibrates by quantiles that were fitted on other prompts.

    Args:
        reward: One reward.
        found: Its calibrator.
        prompt: The calibrator's features are computed from it.

    Raises:
        InvalidRequestError: The prompt has no text.
    """

    is_calibrated = True
    is_incremental = True

    def __init__(self, reward: ResolvedReward, found: FoundCalibrator, prompt: str) -> None:
        if not prompt.strip():
            raise InvalidRequestError(
                "A pooled calibrator judges a prompt by its text, and this one has none.", param="calibration.method"
            )
        (self._part,) = reward.parts
        self._found = found
        self._prompt = prompt

    async def prepare(self) -> None:
        """It is here already."""

    async def score(self, outputs: Sequence[str]) -> list[RewardValue]:
        """One value per output, in order."""
        raw = await self._part.score([RewardInput(prompt=self._prompt, output=output) for output in outputs])
        calibrator = self._found.calibrator
        return [
            RewardValue(
                name=self._part.name,
                version=self._part.version,
                raw=r,
                calibrated=c,
                calibration_size=calibrator.num_rollouts,
                calibration_error=calibrator.standard_error(c),
                calibration_method="pooled",
                calibration_stale=self._found.is_stale,
            )
            for r, c in zip(raw, calibrator.calibrate(self._prompt, raw), strict=True)
        ]
