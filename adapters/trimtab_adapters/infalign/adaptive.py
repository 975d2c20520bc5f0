"""Adaptive N: draw until a calibrated reward reaches a threshold, keep the best. Closed forms without ties.

Draws come in waves, all of a wave at once, so that latency stays low; waves of one are the textbook case. What is
computed here is exact for a known calibrated reward; one estimated from K rollouts adds that error
(`estimation_error.py`).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.polynomial import legendre
from scipy.optimize import brentq


@dataclass(frozen=True, slots=True)
class ThresholdStopping:
    """Stop after the first wave whose best reaches the threshold, or at the cap; the best of all drawn is kept.

    Attributes:
        threshold: τ in [0, 1]; 1 is never reached.
        cap: N, most samples drawn; none when None, and then τ must be below 1.
        wave: w, samples drawn at a time; the last wave before the cap may be smaller.
    """

    threshold: float
    cap: int | None
    wave: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError("the threshold lies between 0 and 1")
        if self.cap is None and self.threshold == 1:
            raise ValueError("without a cap, a threshold of 1 never stops")
        if self.wave < 1 or (self.cap is not None and self.cap < 1):
            raise ValueError("a wave and the cap are at least one sample")

    @property
    def expected_draws(self) -> float:
        """Mean number of samples drawn; for waves of one (1 - τ^N)/(1 - τ)."""
        full, rest, missed = self._waves()
        return self.wave * full + rest * missed

    @property
    def expected_waves(self) -> float:
        """Mean number of waves: how many times as long as one sample it takes."""
        full, rest, missed = self._waves()
        return full + (missed if rest else 0.0)

    @property
    def win_rate(self) -> float:
        """P[what is kept beats one sample of the reference policy]."""
        full, rest, missed = self._waves()
        win = full * _mean_above(self.threshold, self.wave)
        if self.cap is not None:
            win += missed * _mean_above(self.threshold, rest)
            win += self.cap / (self.cap + 1) * self.threshold ** (self.cap + 1)
        return win

    @property
    def kl(self) -> float:
        """KL in nats from what is kept to the reference policy."""
        below = 0.0
        if self.cap is not None and self.threshold > 0:
            n, tau = self.cap, self.threshold
            below = tau**n * (math.log(n) + (n - 1) * math.log(tau) - (n - 1) / n)
        if self.threshold == 1:
            return below
        # Above τ the density is full·w u^(w-1) + missed·r u^(r-1): a smooth function on [τ, 1]. Steep for waves of
        # hundreds, hence the many nodes.
        full, rest, missed = self._waves()
        roots, weights = legendre.leggauss(200)
        half = (1 - self.threshold) / 2
        u = self.threshold + half * (1 + roots)
        density = full * self.wave * u ** (self.wave - 1)
        if rest:
            density += missed * rest * u ** (rest - 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(density > 0, density * np.log(density), 0.0)
        return below + float(half * (weights @ terms))

    def _waves(self) -> tuple[float, int, float]:
        # Mean number of full waves, size of the last smaller one, probability that it is drawn.
        if self.cap is None:
            return 1 / -math.expm1(self.wave * _log(self.threshold)), 0, 0.0
        most, rest = divmod(self.cap, self.wave)
        missed = self.threshold ** (most * self.wave)
        if self.threshold == 1:
            return float(most), rest, missed
        log_missed_wave = self.wave * _log(self.threshold)
        return math.expm1(most * log_missed_wave) / math.expm1(log_missed_wave) if most else 0.0, rest, missed


def threshold_for_price(price: float, wave: int = 1) -> float:
    """The threshold of the largest win rate minus `price` times draws, with or without a cap.

    One more wave is worth its price while E[max(best of w, τ)] - τ = (1 - τ) - (1 - τ^(w+1))/(w+1) exceeds w c; for
    waves of one that gives τ = 1 - √(2c), and without a cap the net value is τ too.

    Args:
        price: c > 0, win rate given up for one draw.
        wave: w, samples drawn at a time.

    Returns:
        τ in [0, 1); 0 when even the second wave is not worth its price.

    Raises:
        ValueError: The price is not positive or the wave not at least one.
    """
    if not (math.isfinite(price) and price > 0):
        raise ValueError("the price of a draw must be positive")
    if wave < 1:
        raise ValueError("a wave is at least one sample")

    def gain(tau: float) -> float:
        return (1 - tau) - (1 - tau ** (wave + 1)) / (wave + 1) - wave * price

    if gain(0.0) <= 0:
        return 0.0
    return 1 - math.sqrt(2 * price) if wave == 1 else float(brentq(gain, 0.0, 1.0, xtol=1e-14))


def threshold_for_win_rate(win_rate: float, cap: int | None, wave: int = 1) -> float:
    """The smallest threshold that reaches a win rate, hence the one of the fewest draws.

    The win rate of best-of-n is n/(n+1); without a cap and in waves of one it is reached at τ = (n-1)/(n+1) with
    (n+1)/2 draws, but at more KL than best-of-n spends.

    Returns:
        τ in [0, 1]; 0 when the first wave is enough, 1 when all of the cap is needed.

    Raises:
        ValueError: The win rate is 1 or more, or above that of best-of-cap.
    """

    def excess(tau: float) -> float:
        return ThresholdStopping(tau, cap, wave).win_rate - win_rate

    if excess(0.0) >= 0:
        return 0.0
    highest = 1.0 if cap is None else cap / (cap + 1)
    # Rounding apart: n/(n+1) asked of a cap of n is met by drawing all.
    if win_rate >= 1 or win_rate > highest + 1e-12:
        raise ValueError(f"a win rate of {win_rate:g} is out of reach: the cap allows {highest:g}")
    if cap is None:
        return float(brentq(excess, 0.0, math.nextafter(1.0, 0.0), xtol=1e-14))
    return 1.0 if excess(1.0) <= 0 else float(brentq(excess, 0.0, 1.0, xtol=1e-14))


def _mean_above(tau: float, n: int) -> float:
    # ∫_τ^1 u n u^(n-1) du.
    return n / (n + 1) * (1 - tau ** (n + 1))


def _log(tau: float) -> float:
    return math.log(tau) if tau > 0 else -math.inf
