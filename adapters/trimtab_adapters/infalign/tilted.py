"""The tilt of the reference policy by a transform: f(u) = e^{Φ(u)/β} / Z, optimal for E[Φ] - β KL."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from trimtab_adapters.infalign.rank_policy import RankPolicy
from trimtab_adapters.infalign.transforms import Transform
from trimtab_adapters.infalign.unit_interval import FloatArray, unit_grid


@dataclass(frozen=True)
class TiltedPolicy:
    """One transform with one β. Quantities are by quadrature and do not overflow for small β.

    Attributes:
        transform: Φ.
        beta: β > 0, in the unit of Φ; compare it between transforms only when both are normalised.
    """

    transform: Transform
    beta: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise ValueError("beta must be positive and finite")

    @cached_property
    def ranks(self) -> RankPolicy:
        """The policy at the nodes of the unit grid."""
        return RankPolicy.from_log_weights(self.transform(unit_grid().nodes) / self.beta)

    @cached_property
    def log_partition(self) -> float:
        """log Z = log ∫ e^{Φ/β}."""
        # Anywhere would do in exact arithmetic; where the density is largest the subtraction loses least.
        at = int(np.argmax(self.ranks.log_density))
        top = unit_grid().nodes[at : at + 1]
        return float(self.transform(top)[0] / self.beta - self.ranks.log_density[at])

    def log_density(self, u: FloatArray) -> FloatArray:
        """log f at any values in [0, 1]."""
        return self.transform(u) / self.beta - self.log_partition

    def density(self, u: FloatArray) -> FloatArray:
        """The density f at any values in [0, 1]."""
        return np.exp(self.log_density(u))

    def mean_transform(self) -> float:
        """E_f[Φ]."""
        return self.ranks.mean(self.transform(unit_grid().nodes))

    def kl(self) -> float:
        """KL to the reference policy, in nats."""
        return self.ranks.kl()
