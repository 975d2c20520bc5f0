"""Best-of-Poisson: best-of-n with n = 1 + Poisson(μ), a near stand-in for the tilt by u (arXiv 2506.19248).

The paper does not say what n = 0 does; one sample is always drawn here, so μ + 1 are on average.
"""

import math
from dataclasses import dataclass

import numpy as np

from trimtab_adapters.infalign.rank_policy import RankPolicy
from trimtab_adapters.infalign.unit_interval import FloatArray, unit_grid


@dataclass(frozen=True, slots=True)
class BestOfPoisson:
    """Best of 1 + Poisson(μ) samples.

    Attributes:
        mu: μ >= 0.
    """

    mu: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mu) and self.mu >= 0):
            raise ValueError("mu must not be negative")

    def cdf(self, u: FloatArray) -> FloatArray:
        """u e^{μ(u-1)}."""
        return np.asarray(u * np.exp(self.mu * (u - 1)))

    def density(self, u: FloatArray) -> FloatArray:
        """(1 + μu) e^{μ(u-1)}."""
        return np.asarray((1 + self.mu * u) * np.exp(self.mu * (u - 1)))

    @property
    def win_rate(self) -> float:
        """Win rate over one sample: 1 - 1/μ + (1 - e^{-μ})/μ²."""
        if self.mu < 1e-3:
            return 0.5 + self.mu / 6 - self.mu**2 / 24  # The next term, μ³/120, is below 1e-11.
        return 1 - 1 / self.mu - math.expm1(-self.mu) / self.mu**2

    @property
    def ranks(self) -> RankPolicy:
        """The policy at the nodes of the unit grid."""
        u = unit_grid().nodes
        return RankPolicy.from_log_weights(np.log1p(self.mu * u) + self.mu * (u - 1))

    def kl(self) -> float:
        """KL to the reference policy in nats, by quadrature."""
        return self.ranks.kl()
