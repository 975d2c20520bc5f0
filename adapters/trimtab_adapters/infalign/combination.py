"""Several calibrated rewards as one, calibrated again in closed form when they are independent without ties.

Real rewards are correlated: there the combination is calibrated on the same reference rollouts instead.
"""

import math


def independent_minimum(smallest: float, m: int) -> float:
    """P[min of m independent calibrated rewards <= s] = 1 - (1 - s)^m: the minimum, calibrated again."""
    _check(smallest, m)
    return -math.expm1(m * math.log1p(-smallest)) if smallest < 1 else 1.0


def independent_product(product: float, m: int) -> float:
    """P[product of m independent calibrated rewards <= s] = s Σ_{k<m} (-log s)^k / k!: it, calibrated again."""
    _check(product, m)
    if product == 0:
        return 0.0
    return product * math.fsum((-math.log(product)) ** k / math.factorial(k) for k in range(m))


def _check(s: float, m: int) -> None:
    if not 0 <= s <= 1:
        raise ValueError("a calibrated reward lies between 0 and 1")
    if m < 1:
        raise ValueError("m must be at least 1")
