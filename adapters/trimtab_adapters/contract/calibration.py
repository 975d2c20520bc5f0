"""Calibrated reward: where a reward stands among the reference policy's own samples for the same prompt.

C(x, y) = P[r(z) < r(y)] + ½ P[r(z) = r(y)] with z from the reference policy (InfAlign, section on calibration).
It lies in [0, 1], does not change under any increasing map of the reward and has mean ½ under the reference policy.
"""

import hashlib
import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class EmpiricalCalibrator:
    """Empirical distribution of the reward over K reference rollouts of one prompt.

    Attributes:
        scores: The K rewards in increasing order.
        reference: What they were drawn from: base model, steering and sampling settings, as one string.
        reward: Name and version of the reward.
    """

    scores: tuple[float, ...]
    reference: str
    reward: str

    @classmethod
    def fit(cls, scores: Sequence[float], *, reference: str, reward: str) -> Self:
        """Build from K >= 1 rewards in any order.

        Raises:
            ValueError: No reward, or one that is not finite.
        """
        if not scores:
            raise ValueError("a calibrator needs at least one reference reward")
        if not all(math.isfinite(s) for s in scores):
            raise ValueError("a reference reward is not finite")
        return cls(scores=tuple(sorted(scores)), reference=reference, reward=reward)

    @property
    def size(self) -> int:
        """K, the number of reference rollouts."""
        return len(self.scores)

    def extend(self, scores: Sequence[float]) -> Self:
        """A calibrator over these and further rewards of the same reference policy.

        Raises:
            ValueError: One of them is not finite.
        """
        return self.fit([*self.scores, *scores], reference=self.reference, reward=self.reward)

    def calibrate(self, reward: float) -> float:
        """The share of reference rollouts that score lower, ties half; in [0, 1]. Unbiased for C(x, y).

        Raises:
            ValueError: The reward is not finite: NaN has no place in an order.
        """
        if not math.isfinite(reward):
            raise ValueError("the reward to calibrate is not finite")
        below, not_above = bisect_left(self.scores, reward), bisect_right(self.scores, reward)
        return (below + not_above) / (2 * len(self.scores))

    def standard_error(self, calibrated: float) -> float:
        """Standard error of `calibrate` for K rollouts; see `shrunk_standard_error`."""
        return shrunk_standard_error(calibrated, self.size)


@dataclass(frozen=True, slots=True)
class ReferenceScores:
    """Rewards of K reference rollouts of one prompt, rollout by rollout: what per-prompt calibrators are made of.

    Attributes:
        rows: [K][m], one score per reward of a mix; m is 1 for a single reward.
        reference: What the rollouts were drawn from, as one string; see `ReferencePolicy.key`.
        reward: Name and version of the rewards, `name@version`, one line each.
    """

    rows: tuple[tuple[float, ...], ...]
    reference: str
    reward: str

    @classmethod
    def fit(cls, rows: Sequence[Sequence[float]], *, reference: str, reward: str) -> Self:
        """Build from K >= 1 rollouts, in any order.

        Raises:
            ValueError: No rollout, rollouts with different numbers of scores, or a score that is not finite.
        """
        if not rows or not rows[0]:
            raise ValueError("a calibrator needs at least one reference reward")
        if any(len(row) != len(rows[0]) for row in rows):
            raise ValueError("every rollout needs one score per reward")
        if not all(math.isfinite(score) for row in rows for score in row):
            raise ValueError("a reference reward is not finite")
        return cls(tuple(tuple(row) for row in rows), reference, reward)

    @property
    def size(self) -> int:
        """K, the number of reference rollouts."""
        return len(self.rows)

    def extend(self, rows: Sequence[Sequence[float]]) -> Self:
        """These and further rollouts of the same reference policy. Raises `ValueError` as `fit` does."""
        return self.fit([*self.rows, *rows], reference=self.reference, reward=self.reward)

    def part(self, index: int = 0) -> EmpiricalCalibrator:
        """The calibrator of one reward."""
        return EmpiricalCalibrator.fit([row[index] for row in self.rows], reference=self.reference, reward=self.reward)


def shrunk_standard_error(calibrated: float, size: int) -> float:
    """Standard error of a share of `size` independent samples, sqrt(p (1 - p) / size) with p shrunk by half a count.

    The shrinkage (size · p + ½) / (size + 1) keeps the error of an empirical 0 or 1 from being reported as 0.
    """
    p = (size * calibrated + 0.5) / (size + 1)
    return math.sqrt(p * (1 - p) / size)


def leave_one_out(scores: Sequence[float]) -> list[float]:
    """Calibrated reward of each of N reference samples among the other N - 1, ties half; unbiased for C(x, y).

    For samples of the reference policy itself, when there are no further rollouts to rank them against. The mean over
    all N is exactly ½.

    Args:
        scores: The N >= 2 rewards of one prompt, in any order.

    Returns:
        One value in [0, 1] per reward, in the order given.

    Raises:
        ValueError: Fewer than two rewards, or one that is not finite.
    """
    if len(scores) < 2:
        raise ValueError("leave-one-out needs at least two rewards")
    if not all(math.isfinite(s) for s in scores):
        raise ValueError("a reward is not finite")
    ordered = sorted(scores)
    # A reward ties with itself: it adds 1 to `not_above` and is taken out again.
    return [(bisect_left(ordered, s) + bisect_right(ordered, s) - 1) / (2 * (len(ordered) - 1)) for s in scores]


def prompt_key(prompt_token_ids: Sequence[int], prompt: str = "") -> str:
    """Identity of a prompt in a store of calibrators, 64 hex digits.

    It covers the text as well as the token ids: a reward that reads the prompt may see different texts for the same
    ids, for example none when the caller sent ids.
    """
    digest = hashlib.sha256(",".join(map(str, prompt_token_ids)).encode())
    digest.update(b"\0" + prompt.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
