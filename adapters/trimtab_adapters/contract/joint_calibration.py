"""Calibration of several rewards as one, on the same reference rollouts (InfAlign's calibrated reward, twice).

Each reward is ranked among the K rollouts, the ranks are combined, and the combination is ranked again, so that it is
a calibrated reward like any other. Independent continuous rewards have closed forms: with s the combined value, the
recalibrated minimum of m is 1 - (1 - s)^m and their product s Σ_{k<m} (-ln s)^k / k!. Real rewards hang together; the
joint rollouts know how.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from trimtab_adapters.contract.calibration import leave_one_out, shrunk_standard_error
from trimtab_adapters.contract.rewards import Combine

Floats = NDArray[np.float64]

_REPLICATES = 100
_MAX_REPLICATED_ROWS = 20_000
_DECIMALS = 12
"""Combined ranks that are equal as fractions must be equal as floats, in whatever order they were added."""


@dataclass(frozen=True)
class JointCalibrator:
    """K reference rollouts of one prompt, each scored by m rewards, and how the m become one.

    The candidate is ranked *together with* the rollouts, K + 1 in all, before the ranks are combined: then it and they
    are treated alike, and the mean over the reference policy is ½ exactly, for any K, with ties and for rewards that
    depend on each other. So its value depends on the rollouts and itself, never on other candidates, and a candidate
    that is nowhere lower than another never gets a lower value.

    Attributes:
        rows: [K][m], finite.
        combine: How.
        weights: One per reward, summing to 1; of use for `mean` only.
    """

    rows: tuple[tuple[float, ...], ...]
    combine: Combine
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("a calibrator needs at least one reference rollout")
        if any(len(row) != len(self.weights) for row in self.rows):
            raise ValueError("every rollout needs one score per reward")
        if not np.isfinite(self._scores).all():
            raise ValueError("a reference reward is not finite")

    @property
    def size(self) -> int:
        """K, the number of reference rollouts."""
        return len(self.rows)

    def combined(self, scores: Sequence[float]) -> float:
        """The candidate's ranks combined, in (0, 1): what is calibrated at last. Ranks are (K·C + ½) / (K + 1)."""
        s, _ = _combined(self._scores[None], _ranks(self._scores)[None], self._checked(scores), self)
        return float(s[0])

    def calibrate(self, scores: Sequence[float]) -> float:
        """The share of reference rollouts whose combination is lower, ties half.

        Raises:
            ValueError: Another number of scores than rewards, or one that is not finite.
        """
        return float(self._calibrated(self._scores[None], _ranks(self._scores)[None], self._checked(scores))[0])

    def standard_error(self, scores: Sequence[float]) -> float:
        """Standard error of `calibrate`, by bootstrap over the rollouts; the ranks of each reward err as well.

        sqrt(p (1 - p) / K) alone is too small by a fifth (mean of two) to a half (minimum of three). It is the least
        that is told, since where all replicates agree the bootstrap would say 0.
        """
        y = self._checked(scores)
        spread = float(np.std(self._calibrated(*self._replicates, y)))
        return max(spread, shrunk_standard_error(self.calibrate(scores), self.size))

    @cached_property
    def _scores(self) -> Floats:
        return np.asarray(self.rows, dtype=np.float64)

    @cached_property
    def _replicates(self) -> tuple[Floats, Floats]:
        """Resampled scores and their ranks, [replicates, K, m]; the same at every call, so that answers repeat."""
        count = max(20, min(_REPLICATES, _MAX_REPLICATED_ROWS // self.size))
        picked = np.random.default_rng(0).integers(0, self.size, (count, self.size))
        resampled = self._scores[picked]
        return resampled, _ranks(resampled)

    def _calibrated(self, scores: Floats, ranks: Floats, y: Floats) -> Floats:
        mine, theirs = _combined(scores, ranks, y, self)
        return np.asarray(np.mean((theirs < mine[:, None]) + 0.5 * (theirs == mine[:, None]), axis=-1))

    def _checked(self, scores: Sequence[float]) -> Floats:
        if len(scores) != len(self.weights):
            raise ValueError("one score per reward is needed")
        y = np.asarray(scores, dtype=np.float64)
        if not np.isfinite(y).all():
            raise ValueError("a reward to calibrate is not finite")
        return y


def joint_leave_one_out(
    rows: Sequence[Sequence[float]], combine: Combine, weights: Sequence[float]
) -> tuple[list[float], list[float]]:
    """Several rewards of each of N samples of the reference policy, calibrated among the N themselves.

    Args:
        rows: [N][m], N >= 2.
        combine: How the m become one.
        weights: One per reward, summing to 1; of use for `mean` only.

    Returns:
        Combined ranks, and their leave-one-out calibrated values, whose mean is exactly ½; in the order given.

    Raises:
        ValueError: Fewer than two samples, or a reward that is not finite.
    """
    scores = np.asarray(rows, dtype=np.float64)
    if not np.isfinite(scores).all():
        raise ValueError("a reward is not finite")
    combined = _combine(_ranks(scores) / len(scores), combine, weights).tolist()
    return combined, leave_one_out(combined)


def _ranks(scores: Floats) -> Floats:
    """How many rows are lower plus half of those that are equal, itself included; per reward, over the last but one."""
    return np.asarray(rankdata(scores, axis=-2), dtype=np.float64) - 0.5


def _combined(scores: Floats, ranks: Floats, y: Floats, how: JointCalibrator) -> tuple[Floats, Floats]:
    """Combined ranks among K + 1 of the candidate, [replicates], and of the rollouts beside it, [replicates, K]."""
    size = scores.shape[-2]
    below, equal = scores < y, scores == y
    mine = (below.sum(-2) + 0.5 * equal.sum(-2) + 0.5) / (size + 1)
    theirs = (ranks + (scores > y) + 0.5 * equal) / (size + 1)
    return _combine(mine, how.combine, how.weights), _combine(theirs, how.combine, how.weights)


def _combine(ranks: Floats, combine: Combine, weights: Sequence[float]) -> Floats:
    combined: Any
    match combine:
        case "mean":
            combined = ranks @ np.asarray(weights, dtype=np.float64)
        case "min":
            combined = ranks.min(axis=-1)
        case "product":
            combined = ranks.prod(axis=-1)
    return np.asarray(np.round(combined, _DECIMALS), dtype=np.float64)
