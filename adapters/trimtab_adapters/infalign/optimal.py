"""The transform that is optimal for a procedure: the fixed point of "tilt by your own influence".

Plain iteration oscillates for small β. The step is therefore cut until the objective W - β KL rises along it
(backtracking), which for best-of-N, whose objective is strictly concave, ends at the one optimum. `shooting.py` finds
the same by another way.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from trimtab_adapters.infalign.procedures import Procedure
from trimtab_adapters.infalign.rank_policy import RankPolicy
from trimtab_adapters.infalign.transforms import Tabulated
from trimtab_adapters.infalign.unit_interval import FloatArray, unit_grid

_SMALLEST_STEP = 2.0**-20


@dataclass(frozen=True)
class OptimalPolicy:
    """A policy that maximises the win rate under a procedure minus β KL.

    Attributes:
        procedure: What is done with samples.
        beta: Weight of the KL, in win rate per nat.
        ranks: The policy.
        residual: Largest difference between Φ/β and log f up to a constant, in nats: how far from the fixed point.
    """

    procedure: Procedure
    beta: float
    ranks: RankPolicy
    residual: float

    @property
    def win_rate(self) -> float:
        """Win rate over the reference policy under the procedure."""
        return self.procedure.win_rate(self.ranks)

    @property
    def kl(self) -> float:
        """KL to the reference policy in nats."""
        return self.ranks.kl()

    @cached_property
    def transform(self) -> Tabulated:
        """Φ, from 0 at 0 to its largest value at 1; tilting by it with this β gives the policy back."""
        influence = self.procedure.influence(self.ranks)
        # The last node is 2e-13 below 1. Near 0, where Φ is next to 0, quadrature may fall back below it.
        values = np.maximum.accumulate(np.concatenate(([0.0], influence, influence[-1:])))
        return Tabulated((0.0, *unit_grid().nodes.tolist(), 1.0), tuple(values.tolist()))


def solve_optimal(
    procedure: Procedure,
    beta: float,
    *,
    start: RankPolicy | None = None,
    tolerance: float = 1e-10,
    max_steps: int = 20_000,
) -> OptimalPolicy:
    """Solve the fixed point.

    Args:
        procedure: What is done with samples.
        beta: Weight of the KL, > 0.
        start: Policy to start from; the reference policy when not given. Worst-of-N is not concave: other starts may be
            tried, though none has been seen to end elsewhere.
        tolerance: Largest residual, in nats.
        max_steps: Steps after which to give up.

    Raises:
        ValueError: β is not positive.
        ArithmeticError: No convergence within `max_steps`, or no step raises the objective any more.
    """
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError("beta must be positive and finite")
    policy = start if start is not None else RankPolicy.reference()
    direction = _direction(procedure, beta, policy)
    step = 1.0
    for _ in range(max_steps):
        residual = _residual(direction, policy)
        if residual < tolerance:
            return OptimalPolicy(procedure, beta, policy, residual)
        slope = policy.mean(direction**2)
        step = min(1.0, 2 * step)
        while True:
            tried = RankPolicy.from_log_weights(policy.log_density + step * direction)
            ahead = _direction(procedure, beta, tried)
            if tried.mean(ahead * (direction - tried.mean(direction))) > -0.5 * slope:
                break
            step /= 2
            if step < _SMALLEST_STEP:
                raise ArithmeticError("no step raises the objective: the grid is too coarse for so small a beta")
        policy, direction = tried, ahead
    raise ArithmeticError(f"no fixed point within {max_steps} steps")


def _direction(procedure: Procedure, beta: float, policy: RankPolicy) -> FloatArray:
    # From log f to the log of the tilt by the policy's own influence, less a constant that normalisation ignores.
    # It is also the gradient of the objective over β, so its products are slopes of W - β KL without a difference of
    # two nearly equal objectives.
    change = procedure.influence(policy) / beta - policy.log_density
    return change - policy.mean(change)


def _residual(direction: FloatArray, policy: RankPolicy) -> float:
    # Where a policy has next to no mass its fixed point cannot be seen.
    return float(np.max(np.abs(direction) * (policy.density > 1e-300)))
