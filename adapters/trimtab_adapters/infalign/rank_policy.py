"""A policy on the calibrated scale: a density against the uniform values of the reference policy's samples."""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np

from trimtab_adapters.infalign.unit_interval import FloatArray, unit_grid


@dataclass(frozen=True, slots=True, eq=False)
class RankPolicy:
    """Density f and distribution function F at the nodes of the unit grid.

    Attributes:
        log_density: [nodes], log f; -inf where the policy has no mass.
        density: [nodes].
        cdf: [nodes], ∫_0^u f.
    """

    log_density: FloatArray
    density: FloatArray
    cdf: FloatArray

    @classmethod
    def from_log_weights(cls, log_weights: FloatArray) -> Self:
        """Normalise weights that are known up to a factor, by way of their largest so that none overflows.

        Raises:
            ValueError: A log weight is NaN or +inf, or no weight is positive.
        """
        largest = float(np.max(log_weights))
        if not math.isfinite(largest):
            raise ValueError("the weights of a policy must be finite and some of them positive")
        log_density = log_weights - largest - math.log(unit_grid().integral(np.exp(log_weights - largest)))
        density = np.exp(log_density)
        cdf = np.clip(unit_grid().running_integral(density), 0.0, 1.0)
        # Where a density changes by orders of magnitude within a panel, the quadrature may fall back by 1e-10.
        return cls(log_density, density, np.maximum.accumulate(cdf))

    @classmethod
    def from_density(cls, density: FloatArray) -> Self:
        """Build from a density at the nodes; it is divided by its integral."""
        with np.errstate(divide="ignore"):
            return cls.from_log_weights(np.log(density))

    @classmethod
    def reference(cls) -> Self:
        """The reference policy itself: uniform."""
        return cls.from_log_weights(np.zeros_like(unit_grid().nodes))

    def mean(self, values: FloatArray) -> float:
        """E_f of a function given at the nodes; it is not asked where the policy has no mass."""
        return unit_grid().integral(np.where(self.density > 0, values, 0.0) * self.density)

    def kl(self) -> float:
        """KL(f || reference) in nats.

        It is the divergence between the policies over texts when this one is a tilt of the reference policy by a
        function of the calibrated reward; for any other policy with these ranks it is a lower bound of it.
        """
        return self.mean(self.log_density)

    def kl_to(self, other: "RankPolicy") -> float:
        """KL(self || other) in nats."""
        return self.mean(self.log_density - other.log_density)

    def reflected(self) -> Self:
        """The policy with density f(1 - u)."""
        return self.from_log_weights(self.log_density[::-1])
