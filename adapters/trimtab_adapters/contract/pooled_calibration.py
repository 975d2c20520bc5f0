"""A calibrator for prompts that nobody sampled: quantiles of the reward as a function of the prompt.

It estimates C(x, y) from other prompts' rollouts, so it is biased for any one prompt; how much, was measured on prompts
that took no part in the fit, and travels with it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from trimtab_adapters.contract.prompt_features import PromptFeatures

Floats = NDArray[np.float64]

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class PooledCalibrator:
    """Quantiles of the reward, linear in the prompt's features.

    Lines fitted for each level may cross; the quantiles of a prompt are sorted before use (rearrangement of
    Chernozhukov, Fernández-Val and Galichon, 2010), so that the calibrated reward never falls as the reward rises.

    Attributes:
        features: Of prompts.
        levels: [L], increasing, in (0, 1).
        intercepts: [L], the quantiles of a prompt whose features are all 0.
        slopes: [L, d].
        reference: What the rollouts were drawn from, a `ReferencePolicy.key`.
        reward: Name and version of the reward, `name@version`.
        num_rollouts: n, of the fit.
        num_prompts: Of the fit.
        error: Root mean square of C_pooled(x, y) - C(x, y) on held-out prompts.
    """

    features: PromptFeatures
    levels: Floats
    intercepts: Floats
    slopes: Floats
    reference: str
    reward: str
    num_rollouts: int
    num_prompts: int
    error: float

    def quantiles(self, prompts: list[str]) -> Floats:
        """Quantiles of the reward at `levels`, increasing; [prompts, L]."""
        return np.sort(self.intercepts + self.features.apply(prompts) @ self.slopes.T, axis=1)

    def calibrate(self, prompt: str, rewards: list[float]) -> list[float]:
        """Calibrated rewards of outputs of one prompt; ties half.

        Raises:
            ValueError: A reward is not finite.
        """
        if not all(math.isfinite(reward) for reward in rewards):
            raise ValueError("a reward to calibrate is not finite")
        calibrated = calibrated_by_quantiles(self.quantiles([prompt])[0], self.levels, np.asarray(rewards))
        return [float(value) for value in calibrated]

    def standard_error(self, calibrated: float) -> float:
        """Root mean square error of `calibrate`, spread over [0, 1] as errors of distribution functions are.

        They vanish at both ends: error² · 6 p (1 - p), whose mean over p is error². p is shrunk by half a count.
        """
        p = (self.num_prompts * calibrated + 0.5) / (self.num_prompts + 1)
        return self.error * math.sqrt(6 * p * (1 - p))

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and texts."""
        return {
            "schema_version": SCHEMA_VERSION,
            "directions": self.features.directions.tolist(),
            "mean": self.features.mean.tolist(),
            "scale": self.features.scale.tolist(),
            "levels": self.levels.tolist(),
            "intercepts": self.intercepts.tolist(),
            "slopes": self.slopes.tolist(),
            "reference": self.reference,
            "reward": self.reward,
            "num_rollouts": self.num_rollouts,
            "num_prompts": self.num_prompts,
            "error": self.error,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`. Raises `ValueError` for what another version of Trimtab wrote."""
        if value.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"a pooled calibrator of schema version {value.get('schema_version')!r} cannot be read")

        def numbers(name: str) -> Floats:
            return np.asarray(value[name], dtype=np.float64)

        return cls(
            features=PromptFeatures(numbers("directions"), numbers("mean"), numbers("scale")),
            levels=numbers("levels"),
            intercepts=numbers("intercepts"),
            slopes=numbers("slopes"),
            reference=str(value["reference"]),
            reward=str(value["reward"]),
            num_rollouts=int(value["num_rollouts"]),
            num_prompts=int(value["num_prompts"]),
            error=float(value["error"]),
        )


def calibrated_by_quantiles(quantiles: Floats, levels: Floats, rewards: Floats) -> Floats:
    """The level of each reward between increasing quantiles; where several are equal to it, the middle of theirs.

    Beyond the outermost quantiles nothing is known but that less than the outermost level lies there: half of it.

    Args:
        quantiles: [L], increasing.
        levels: [L].
        rewards: [n].

    Returns:
        [n], in (0, 1), not falling as the reward rises.
    """
    first, behind = np.searchsorted(quantiles, rewards, "left"), np.searchsorted(quantiles, rewards, "right")
    last = len(levels) - 1
    tied = (levels[np.minimum(first, last)] + levels[np.maximum(behind - 1, 0)]) / 2
    low, high = np.clip(first - 1, 0, last), np.clip(first, 0, last)
    width = quantiles[high] - quantiles[low]
    share = np.where(width > 0, (rewards - quantiles[low]) / np.where(width > 0, width, 1.0), 0.5)
    between = levels[low] + share * (levels[high] - levels[low])
    inside = np.where(behind > first, tied, between)
    outside = np.where(rewards < quantiles[0], levels[0] / 2, (1 + levels[last]) / 2)
    return np.asarray(np.where((rewards < quantiles[0]) | (rewards > quantiles[last]), outside, inside))
