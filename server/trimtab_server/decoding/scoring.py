"""Rewards of the outputs of one prompt, calibrated where that was asked for. Strategies see nothing else of rewards."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from trimtab_adapters.contract.calibration import EmpiricalCalibrator
from trimtab_adapters.contract.records import RewardValue
from trimtab_adapters.contract.rewards import RewardChoice, RewardInput
from trimtab_server.decoding.candidates import ReferenceDraw
from trimtab_server.decoding.reference import ReferenceCalibrators
from trimtab_server.rewards.registry import RewardRegistry
from trimtab_server.rewards.resolved import ResolvedReward


@dataclass(frozen=True, slots=True)
class CalibrationChoice:
    """How rewards are calibrated.

    Attributes:
        size: Reference rollouts per prompt; None means the default, 0 no calibration.
    """

    size: int | None = None


class PromptScorer(Protocol):
    """Scores outputs of one prompt. May be called several times, also concurrently; all values are comparable."""

    @property
    def is_calibrated(self) -> bool:
        """Whether `score` gives calibrated values."""
        ...

    @property
    def is_incremental(self) -> bool:
        """Whether a value depends on its own output alone. Not so where outputs are ranked among each other."""
        ...

    async def prepare(self) -> None:
        """Find or make the calibrator. Not needed before `score`, but it can run while candidates are generated."""
        ...

    async def score(self, outputs: Sequence[str]) -> list[RewardValue]:
        """One value per output, in order.

        Raises:
            RewardError: An output or a reference rollout could not be scored. A missing reward is never 0.
            EngineError: The reference rollouts could not be drawn.
        """
        ...


class Scoring(Protocol):
    """Makes the scorer of a prompt."""

    async def for_prompt(
        self,
        reward: RewardChoice,
        *,
        calibration: CalibrationChoice,
        prompt: str,
        prompt_token_ids: Sequence[int],
        draw_reference: ReferenceDraw,
    ) -> PromptScorer:
        """The scorer of one prompt; rewards are asked for once, so that all its values come from one version.

        Raises:
            NotFoundError: No reward of that name is registered.
            RewardError: It is registered but cannot be loaded here.
        """
        ...


class CalibratedScoring:
    """`Scoring` with rewards from the registry and calibrators from reference rollouts.

    Args:
        registry: Finds rewards by name.
        calibrators: Finds or makes calibrators.
    """

    def __init__(self, registry: RewardRegistry, calibrators: ReferenceCalibrators) -> None:
        self._registry = registry
        self._calibrators = calibrators

    async def for_prompt(
        self,
        reward: RewardChoice,
        *,
        calibration: CalibrationChoice,
        prompt: str,
        prompt_token_ids: Sequence[int],
        draw_reference: ReferenceDraw,
    ) -> PromptScorer:
        """See `Scoring.for_prompt`."""
        resolved = await self._registry.resolve(reward)
        return _ReferenceScorer(resolved, self._calibrators, prompt, prompt_token_ids, draw_reference, calibration)


class _ReferenceScorer:
    """Ranks outputs among reference rollouts of the same prompt."""

    def __init__(
        self,
        reward: ResolvedReward,
        calibrators: ReferenceCalibrators,
        prompt: str,
        prompt_token_ids: Sequence[int],
        draw_reference: ReferenceDraw,
        calibration: CalibrationChoice,
    ) -> None:
        self._reward = reward
        self._calibrators = calibrators
        self._prompt = prompt
        self._prompt_token_ids = prompt_token_ids
        self._draw_reference = draw_reference
        self._calibration = calibration
        self._calibrator: EmpiricalCalibrator | None = None
        self._preparing = asyncio.Lock()

    @property
    def is_calibrated(self) -> bool:
        """Whether `score` gives calibrated values."""
        return self._calibration.size != 0

    @property
    def is_incremental(self) -> bool:
        """Reference rollouts do not change with the outputs."""
        return True

    async def prepare(self) -> None:
        """Find or make the calibrator."""
        async with self._preparing:
            if self.is_calibrated and self._calibrator is None:
                (part,) = self._reward.parts
                self._calibrator = await self._calibrators.get(
                    prompt=self._prompt,
                    prompt_token_ids=self._prompt_token_ids,
                    reward=part,
                    draw_reference=self._draw_reference,
                    size=self._calibration.size,
                )

    async def score(self, outputs: Sequence[str]) -> list[RewardValue]:
        """One value per output, in order."""
        (part,) = self._reward.parts
        raw = await part.score([RewardInput(prompt=self._prompt, output=output) for output in outputs])
        await self.prepare()
        return [self._value(r) for r in raw]

    def _value(self, raw: float) -> RewardValue:
        value = RewardValue(name=self._reward.name, version=self._reward.version, raw=raw)
        if self._calibrator is None:
            return value
        calibrated = self._calibrator.calibrate(raw)
        return value.model_copy(
            update={
                "calibrated": calibrated,
                "calibration_size": self._calibrator.size,
                "calibration_error": self._calibrator.standard_error(calibrated),
            }
        )
