"""Closed forms of best-of-N over a finite set of outcomes: what selection can gain and what it costs.

Outcomes are listed from worst to best reward; one entry may stand for several outputs of equal reward. The quantities
hold for one prompt and for samples of the reference policy that are independent of each other.
"""

import math
from collections.abc import Sequence
from itertools import accumulate


def best_of_n_distribution(p: Sequence[float], n: int) -> list[float]:
    """Probability of each outcome under best-of-n from `p`, ties included: q_i = F_i^n - F_(i-1)^n, F cumulative.

    Args:
        p: Probabilities of the outcomes from worst to best, each >= 0; they are divided by their sum.
        n: Number of samples, >= 1.

    Raises:
        ValueError: `n` < 1, an entry that is negative or not finite, or a sum that is not positive.
    """
    _check_n(n)
    if not all(math.isfinite(x) and x >= 0 for x in p):
        raise ValueError("a probability is negative or not finite")
    total = math.fsum(p)
    if total <= 0:
        raise ValueError("the probabilities sum to 0")
    below = 0.0
    distribution = []
    for x, cumulative in zip(p, accumulate(p), strict=True):
        up_to = cumulative / total
        distribution.append(up_to**n * _missed_at_least_once(x / total, below, up_to, n))
        below = up_to
    return distribution


def _missed_at_least_once(x: float, below: float, up_to: float, n: int) -> float:
    """1 - (below / up_to)^n for below + x = up_to, without losing digits where the power is close to 1."""
    if x == 0:
        return 0.0
    if below < x:
        return 1 - (below / up_to) ** n
    return -math.expm1(n * math.log1p(-x / up_to))


def win_rate(q: Sequence[float], p: Sequence[float]) -> float:
    """Probability that a sample of `q` has a larger reward than one of `p`, ties half. Outcomes from worst to best."""
    below = 0.0
    win = 0.0
    for q_i, p_i in zip(q, p, strict=True):
        win += q_i * (below + p_i / 2)
        below += p_i
    return win


def kl_divergence(q: Sequence[float], p: Sequence[float]) -> float:
    """KL(q || p) in nats; infinite when `q` has mass where `p` has none."""
    terms = []
    for q_i, p_i in zip(q, p, strict=True):
        if q_i == 0:
            continue
        if p_i == 0:
            return math.inf
        terms.append(q_i * math.log(q_i / p_i))
    return math.fsum(terms)


def best_of_n_kl_upper_bound(n: int) -> float:
    """Upper bound log n - (n - 1) / n on KL(best-of-n || base) in nats; reached only without ties (arXiv 2401.01879).

    Raises:
        ValueError: `n` < 1.
    """
    _check_n(n)
    return math.log(n) - (n - 1) / n


def best_of_n_win_rate_upper_bound(n: int) -> float:
    """Upper bound n / (n + 1) on the win rate of best-of-n over one sample of the base; reached only without ties.

    Raises:
        ValueError: `n` < 1.
    """
    _check_n(n)
    return n / (n + 1)


def _check_n(n: int) -> None:
    if n < 1:
        raise ValueError("n must be at least 1")
