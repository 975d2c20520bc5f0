"""Adaptive N when the calibrated reward is estimated from K reference rollouts of the prompt.

A candidate whose estimate reaches j/K beats at least j of the K rollouts, so the threshold really is the j-th smallest
of K uniform numbers, Beta(j, K + 1 - j), the same for all candidates of the prompt. Given it, `ThresholdStopping` holds
exactly, also for the best of all drawn, since estimates keep the order of the rewards; quantities are means over it.
Without ties.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from scipy.stats import beta

from trimtab_adapters.infalign.adaptive import ThresholdStopping
from trimtab_adapters.infalign.unit_interval import FloatArray

_NUM_QUANTILES = 256
"""The error of the mean over so many quantiles is far below that of a figure of four digits."""


class EstimatedThreshold:
    """Stop after the first wave in which a candidate beats at least `num_below` of the rollouts.

    Args:
        num_below: j, from 0 to K; 0 stops after the first wave.
        num_rollouts: K >= 1.
        cap: N, most samples drawn.
        wave: w, samples drawn at a time.
    """

    def __init__(self, num_below: int, num_rollouts: int, cap: int, wave: int = 1) -> None:
        if not 0 <= num_below <= num_rollouts or num_rollouts < 1:
            raise ValueError("a candidate beats 0 to K of K rollouts, K at least 1")
        thresholds = _thresholds(num_below, num_rollouts)
        self._given = [ThresholdStopping(float(u), cap, wave) for u in thresholds]

    @property
    def win_rate(self) -> float:
        """P[what is kept beats one sample of the reference policy]."""
        return float(np.mean([stopping.win_rate for stopping in self._given]))

    @property
    def expected_draws(self) -> float:
        """Mean number of samples drawn."""
        return float(np.mean([stopping.expected_draws for stopping in self._given]))


@lru_cache(maxsize=4096)
def estimated_threshold_for_win_rate(win_rate: float, cap: int, wave: int, num_rollouts: int) -> float:
    """The smallest threshold j/K on the estimate that reaches a win rate.

    Raises:
        ValueError: The win rate is above that of best-of-cap, or so many rollouts cannot tell such candidates.
    """
    if win_rate > cap / (cap + 1) + 1e-12:
        raise ValueError(f"a win rate of {win_rate:g} is out of reach: the cap allows {cap / (cap + 1):g}")

    def reaches(j: int) -> bool:
        return EstimatedThreshold(j, num_rollouts, cap, wave).win_rate >= win_rate

    if not reaches(num_rollouts):
        most = EstimatedThreshold(num_rollouts, num_rollouts, cap, wave).win_rate
        raise ValueError(
            f"a win rate of {win_rate:g} is out of reach: {num_rollouts} reference rollouts and cap allow {most:.4g}"
        )
    return _first(reaches, num_rollouts) / num_rollouts


@lru_cache(maxsize=4096)
def estimated_threshold_for_price(price: float, cap: int, wave: int, num_rollouts: int) -> float:
    """The threshold j/K on the estimate with the largest win rate minus `price` times draws.

    Raises:
        ValueError: The price is not positive.
    """
    if not price > 0:
        raise ValueError("the price of a draw must be positive")

    def net(j: int) -> float:
        stopping = EstimatedThreshold(j, num_rollouts, cap, wave)
        return stopping.win_rate - price * stopping.expected_draws

    # Raising the threshold gains less and less and costs more and more, so the first step down is the top.
    return _first(lambda j: j == num_rollouts or net(j + 1) <= net(j), num_rollouts) / num_rollouts


def _first(holds: Callable[[int], bool], last: int) -> int:
    # The smallest number from 0 to `last` of which something holds that holds of all larger ones.
    low, high = 0, last
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _thresholds(num_below: int, num_rollouts: int) -> FloatArray:
    if num_below == 0:
        return np.zeros(1)
    quantiles = (np.arange(_NUM_QUANTILES) + 0.5) / _NUM_QUANTILES
    return np.asarray(beta.ppf(quantiles, num_below, num_rollouts + 1 - num_below), dtype=np.float64)
