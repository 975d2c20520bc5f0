"""Scorers of one prompt's outputs: raw, ranked among reference rollouts, or ranked among each other."""

import asyncio
from collections.abc import Sequence

from trimtab_adapters.contract.calibration import (
    EmpiricalCalibrator,
    ReferenceScores,
    leave_one_out,
    shrunk_standard_error,
)
from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_adapters.contract.joint_calibration import JointCalibrator, joint_leave_one_out
from trimtab_adapters.contract.records import CalibrationMethod, RewardValue
from trimtab_adapters.contract.rewards import RewardInput
from trimtab_server.decoding.candidates import ReferenceDraw
from trimtab_server.decoding.part_scores import score_parts
from trimtab_server.decoding.reference import ReferenceCalibrators
from trimtab_server.rewards.resolved import ResolvedReward


class RawScorer:
    """Leaves a reward as it is."""

    is_calibrated = False
    is_incremental = True

    def __init__(self, reward: ResolvedReward, prompt: str) -> None:
        (self._part,) = reward.parts
        self._prompt = prompt

    async def prepare(self) -> None:
        """There is nothing to prepare."""

    async def score(self, outputs: Sequence[str]) -> list[RewardValue]:
        """One value per output, in order."""
        raw = await self._part.score(_inputs(self._prompt, outputs))
        return [RewardValue(name=self._part.name, version=self._part.version, raw=r) for r in raw]


class ReferenceScorer:
    """Ranks outputs among reference rollouts of the same prompt.

    Args:
        reward: One reward or several.
        calibrators: Finds or makes the reference rollouts' scores.
        prompt: For the reward.
        prompt_token_ids: The prompt as the engine sees it.
        draw_reference: Draws what is missing.
        reference: The reference policy's key.
        size: Reference rollouts, at least 1; None means the default.
    """

    is_calibrated = True
    is_incremental = True

    def __init__(
        self,
        reward: ResolvedReward,
        calibrators: ReferenceCalibrators,
        prompt: str,
        prompt_token_ids: Sequence[int],
        draw_reference: ReferenceDraw,
        *,
        reference: str,
        size: int | None,
    ) -> None:
        self._reward = reward
        self._calibrators = calibrators
        self._prompt = prompt
        self._prompt_token_ids = prompt_token_ids
        self._draw_reference = draw_reference
        self._reference = reference
        self._size = size
        self._parts: list[EmpiricalCalibrator] = []
        self._joint: JointCalibrator | None = None
        self._preparing = asyncio.Lock()

    async def prepare(self) -> None:
        """Find or make the calibrator."""
        async with self._preparing:
            if not self._parts:
                scores = await self._calibrators.get(
                    prompt=self._prompt,
                    prompt_token_ids=self._prompt_token_ids,
                    reward=self._reward,
                    draw_reference=self._draw_reference,
                    reference=self._reference,
                    size=self._size,
                )
                self._calibrate_by(scores)

    async def score(self, outputs: Sequence[str]) -> list[RewardValue]:
        """One value per output, in order."""
        rows = await score_parts(self._reward, _inputs(self._prompt, outputs))
        await self.prepare()
        return [self._value(row) for row in rows]

    def _calibrate_by(self, scores: ReferenceScores) -> None:
        self._parts = [scores.part(i) for i in range(len(self._reward.parts))]
        if self._reward.combine is not None:
            self._joint = JointCalibrator(scores.rows, self._reward.combine, self._reward.weights)

    def _value(self, row: Sequence[float]) -> RewardValue:
        parts = []
        for part, calibrator, raw in zip(self._reward.parts, self._parts, row, strict=True):
            calibrated = calibrator.calibrate(raw)
            error = calibrator.standard_error(calibrated)
            parts.append(_calibrated(part.name, part.version, raw, calibrated, calibrator.size, error, "reference"))
        if self._joint is None:
            (value,) = parts
            return value
        return _calibrated(
            self._reward.name,
            self._reward.version,
            self._joint.combined(row),
            self._joint.calibrate(row),
            self._joint.size,
            self._joint.standard_error(row),
            "reference",
            parts,
        )


class LeaveOneOutScorer:
    """Ranks outputs among each other. They must be samples of the reference policy itself: then nothing is drawn.

    Values of one call are comparable with each other only.
    """

    is_calibrated = True
    is_incremental = False

    def __init__(self, reward: ResolvedReward, prompt: str) -> None:
        self._reward = reward
        self._prompt = prompt

    async def prepare(self) -> None:
        """There is nothing to prepare."""

    async def score(self, outputs: Sequence[str]) -> list[RewardValue]:
        """One value per output, in order.

        Raises:
            InvalidRequestError: There is only one, and nothing to rank it among.
        """
        if len(outputs) < 2:
            raise InvalidRequestError(
                "'leave_one_out' ranks candidates among each other and needs at least two of them.",
                param="calibration.method",
            )
        rows = await score_parts(self._reward, _inputs(self._prompt, outputs))
        columns = list(zip(*rows, strict=True))
        by_part = [
            [
                self._value(part.name, part.version, raw, calibrated, len(rows))
                for raw, calibrated in zip(column, leave_one_out(column), strict=True)
            ]
            for part, column in zip(self._reward.parts, columns, strict=True)
        ]
        if self._reward.combine is None:
            (values,) = by_part
            return values
        combined, calibrated = joint_leave_one_out(rows, self._reward.combine, self._reward.weights)
        return [
            self._value(self._reward.name, self._reward.version, raw, c, len(rows), list(parts))
            for raw, c, parts in zip(combined, calibrated, zip(*by_part, strict=True), strict=True)
        ]

    def _value(
        self,
        name: str,
        version: str,
        raw: float,
        calibrated: float,
        num_outputs: int,
        parts: list[RewardValue] | None = None,
    ) -> RewardValue:
        size = num_outputs - 1
        error = shrunk_standard_error(calibrated, size)
        return _calibrated(name, version, raw, calibrated, size, error, "leave_one_out", parts)


def _calibrated(
    name: str,
    version: str,
    raw: float,
    calibrated: float,
    size: int,
    error: float,
    method: CalibrationMethod,
    parts: list[RewardValue] | None = None,
) -> RewardValue:
    return RewardValue(
        name=name,
        version=version,
        raw=raw,
        calibrated=calibrated,
        calibration_size=size,
        calibration_error=error,
        calibration_method=method,
        parts=parts,
    )


def _inputs(prompt: str, outputs: Sequence[str]) -> list[RewardInput]:
    return [RewardInput(prompt=prompt, output=output) for output in outputs]
