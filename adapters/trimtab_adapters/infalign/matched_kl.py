"""Which β spends a given KL: policies are compared at equal KL, never at equal β."""

import math
from collections.abc import Callable

from scipy.optimize import brentq

from trimtab_adapters.infalign.optimal import OptimalPolicy, solve_optimal
from trimtab_adapters.infalign.procedures import Procedure
from trimtab_adapters.infalign.tilted import TiltedPolicy
from trimtab_adapters.infalign.transforms import Transform

_BETA_RANGE = (1e-6, 1e6)


def tilt_at_kl(transform: Transform, kl: float) -> TiltedPolicy:
    """The tilt by a transform whose KL to the reference policy is `kl` nats.

    Raises:
        ValueError: No β between 1e-6 and 1e6 spends this much or this little.
    """
    return TiltedPolicy(transform, _solve(lambda beta: TiltedPolicy(transform, beta).kl(), kl))


def optimum_at_kl(procedure: Procedure, kl: float) -> OptimalPolicy:
    """The policy of the largest win rate under a procedure among those with a KL of `kl` nats.

    Raises:
        ValueError: No β between 1e-6 and 1e6 spends this much or this little.
    """
    last: OptimalPolicy | None = None

    def kl_of(beta: float) -> float:
        # Policies of close β are close: each search starts where the one before ended.
        nonlocal last
        last = solve_optimal(procedure, beta, start=last.ranks if last is not None else None)
        return last.kl

    return solve_optimal(procedure, _solve(kl_of, kl))


def _solve(kl_of: Callable[[float], float], kl: float) -> float:
    def excess(log_beta: float) -> float:
        return kl_of(math.exp(log_beta)) - kl

    # From β = 1 outwards: KL falls with β, and the extremes of the range are only visited when they are needed.
    low = high = 0.0
    while excess(low) < 0:
        low -= math.log(4)
        if low < math.log(_BETA_RANGE[0]):
            raise ValueError(f"no tilt spends a KL of {kl:g} nats")
    while excess(high) > 0:
        high += math.log(4)
        if high > math.log(_BETA_RANGE[1]):
            raise ValueError(f"no tilt spends so little as a KL of {kl:g} nats")
    return math.exp(brentq(excess, low, high, xtol=1e-11)) if low < high else 1.0
