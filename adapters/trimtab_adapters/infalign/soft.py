"""Soft best-of-n: draw n, choose one with probability proportional to e^{Φ(C)/β} (arXiv 2505.03156).

For n = 1 it is the reference policy, for n to infinity the tilt, which it approaches as 1/n.
"""

import numpy as np

from trimtab_adapters.infalign.rank_policy import RankPolicy
from trimtab_adapters.infalign.tilted import TiltedPolicy
from trimtab_adapters.infalign.unit_interval import unit_grid

# Spacing of the trapezoid rule in log s. Its error for e^{-s} s is below e^{-π²/h}, 1e-17 here.
_STEP = 0.25
_LARGEST_EXPONENT = 600.0


def soft_best_of_n(target: TiltedPolicy, n: int) -> RankPolicy:
    """Distribution of the calibrated reward that soft best-of-n chooses.

    With weights w = e^{(Φ - max Φ)/β} the density is n E[w(u) / (w(u) + w(U_2) + ... + w(U_n))]. By 1/x = ∫ e^{-sx} ds
    over s > 0 that is n w(u) ∫ e^{-s w(u)} L(s)^{n-1} ds with L(s) = E[e^{-s w(U)}]: one integral instead of n.

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError("n must be at least 1")
    log_weights = target.ranks.log_density - np.max(target.ranks.log_density)
    weights = np.exp(log_weights)
    # s from far below 1/n, where nothing has decayed, to far above 1/w for the smallest weight.
    end = min(_LARGEST_EXPONENT, 5 - float(np.min(log_weights)))
    s = np.exp(np.arange(-45.0 - np.log(n), end, _STEP))
    decay = np.exp(-np.outer(s, weights))  # [s, nodes]
    others = (decay @ unit_grid().weights) ** (n - 1)
    return RankPolicy.from_density(n * weights * ((s * others) @ decay) * _STEP)
