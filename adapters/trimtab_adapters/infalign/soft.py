"""Soft best-of-n: draw n, choose one with probability proportional to e^{Φ(C)/β} (arXiv 2505.03156).

For n = 1 it is the reference policy, for n to infinity the tilt, which it approaches as 1/n.
"""

import numpy as np

from trimtab_adapters.infalign.rank_policy import RankPolicy
from trimtab_adapters.infalign.tilted import TiltedPolicy
from trimtab_adapters.infalign.unit_interval import unit_grid

# Spacing of the trapezoid rule in log s; its error for e^{-s} s is about e^{-π²/h}, 1e-17 here.
_STEP = 0.25
_ROWS_AT_ONCE = 1024


def soft_best_of_n(target: TiltedPolicy, n: int) -> RankPolicy:
    """Distribution of the calibrated reward that soft best-of-n chooses.

    With weights w = e^{(Φ - max Φ)/β} the density is n E[w(u) / (w(u) + w(U_2) + ... + w(U_n))]. By 1/x = ∫ e^{-sx} ds
    over s > 0 that is n w(u) ∫ e^{-s w(u)} L(s)^{n-1} ds with L(s) = E[e^{-s w(U)}]: one integral, not n. It takes
    time in proportion to the range of Φ/β, and the grid resolves it for β down to about 1/100 of the range of Φ; below
    that the choice is hard, and best-of-n's closed forms hold.

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError("n must be at least 1")
    log_weights = target.ranks.log_density - np.max(target.ranks.log_density)
    # log s from where nothing has decayed yet to where the smallest weight has.
    log_s = np.arange(-45.0 - np.log(n), 5 - float(np.min(log_weights)), _STEP)
    density = np.zeros_like(log_weights)
    for start in range(0, len(log_s), _ROWS_AT_ONCE):
        # At s w = e^6 nothing is left of e^{-sw}; beyond, s w itself would overflow.
        exponents = np.minimum(log_s[start : start + _ROWS_AT_ONCE, None] + log_weights, 6.0)  # [s, nodes], log(s w)
        products = np.exp(exponents)
        decay = np.exp(-products)
        others = (decay @ unit_grid().weights) ** (n - 1)
        density += n * _STEP * (others @ (products * decay))
    return RankPolicy.from_density(density)
