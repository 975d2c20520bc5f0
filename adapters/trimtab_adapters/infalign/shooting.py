"""The optimal policy by another way than `optimal.py`: shooting the ordinary differential equation of its CDF.

Best-of-N: F'' = (N²/β) (uF)^(N-1) F' with F(0) = 0 and F(1) = 1. Worst-of-N: the same for G(v) = 1 - F(1-v) with the
sign turned. What is shot for is log F'(0); F(1) increases with it. It is a check on the fixed point and gives no
transform.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.integrate import solve_ivp
from scipy.optimize import brentq

from trimtab_adapters.infalign.procedures import Procedure
from trimtab_adapters.infalign.rank_policy import RankPolicy
from trimtab_adapters.infalign.unit_interval import FloatArray, unit_grid


@dataclass(frozen=True, slots=True)
class _Shot:
    procedure: Procedure
    beta: float

    @property
    def sign(self) -> int:
        return -1 if self.procedure.kind == "worst_of_n" else 1

    def slopes(self, u: float, state: FloatArray) -> tuple[float, float]:
        """Derivatives of (F, log F'); the second cannot become negative or overflow on the way."""
        cdf, log_density = state
        n = self.procedure.n
        return math.exp(log_density), self.sign * n**2 / self.beta * (u * max(cdf, 0.0)) ** (n - 1)

    def miss(self, log_start: float) -> float:
        """F(1) - 1, or how far before 1 the value 1 is reached: increasing in `log_start`, 0 where it hits."""
        ended = self._solve(log_start, None)
        return 1 - float(ended.t[-1]) if ended.status == 1 else float(ended.y[0, -1]) - 1

    def log_density(self, log_start: float, at: FloatArray) -> FloatArray:
        """Log F' at increasing points."""
        solved = self._solve(log_start, at)
        return np.concatenate((solved.y[1], np.full(len(at) - solved.y.shape[1], solved.y[1, -1])))

    def _solve(self, log_start: float, at: FloatArray | None):  # type: ignore[no-untyped-def]  # scipy's own type is private
        def reached(_u: float, state: FloatArray) -> float:
            return float(state[0]) - 1

        reached.terminal = True  # type: ignore[attr-defined]
        return solve_ivp(
            self.slopes,
            (0.0, 1.0),
            (0.0, log_start),
            method="DOP853",
            rtol=1e-10,
            atol=1e-12,
            t_eval=at,
            events=reached,
        )


def shoot_optimal(procedure: Procedure, beta: float) -> RankPolicy:
    """The policy that maximises win rate under the procedure minus β KL.

    Raises:
        ValueError: β is not positive.
    """
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError("beta must be positive and finite")
    shot = _Shot(procedure, beta)
    # An increasing density starts at or below 1 and the mirrored one at or above it: one end of the bracket is 0, with
    # a little room for rounding. The other is felt for, since far beyond the answer the solution overflows.
    near, far = 1e-6 * shot.sign, -0.5 * shot.sign
    while shot.miss(far) * shot.sign > 0:
        far *= 2
    log_start = brentq(shot.miss, near, far, xtol=1e-12)
    log_density = shot.log_density(log_start, unit_grid().nodes)
    return RankPolicy.from_log_weights(log_density[::-1] if shot.sign < 0 else log_density)
