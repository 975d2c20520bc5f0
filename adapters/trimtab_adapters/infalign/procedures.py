"""Inference-time procedures and the win rate of a policy over the reference policy when both go through one.

Worst-of-N is best-of-N jailbreaking: an attacker draws N and keeps the output of the lowest reward.
"""

from dataclasses import dataclass
from typing import Literal

from trimtab_adapters.infalign.rank_policy import RankPolicy
from trimtab_adapters.infalign.unit_interval import FloatArray, unit_grid

ProcedureKind = Literal["standard", "best_of_n", "worst_of_n"]


@dataclass(frozen=True, slots=True)
class Procedure:
    """What is done with the samples of a policy before one is shown.

    Attributes:
        kind: One sample as it comes, the best of n, or the worst of n.
        n: Samples drawn; 1 for "standard".
    """

    kind: ProcedureKind
    n: int = 1

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError("n must be at least 1")
        if self.kind == "standard" and self.n != 1:
            raise ValueError("the standard procedure draws one sample")

    def win_rate(self, policy: RankPolicy) -> float:
        """P[procedure on `policy` beats procedure on the reference policy].

        Standard ∫ u f; best-of-N 1 - ∫ N u^(N-1) F^N; worst-of-N ∫ N (1-u)^(N-1) (1-F)^N.
        """
        u, n = unit_grid().nodes, self.n
        if self.kind == "worst_of_n":
            return unit_grid().integral(n * (1 - u) ** (n - 1) * (1 - policy.cdf) ** n)
        return 1 - unit_grid().integral(n * u ** (n - 1) * policy.cdf**n)

    def influence(self, policy: RankPolicy) -> FloatArray:
        """Derivative of the win rate by the density at each node, up to a constant: the transform it asks for.

        It is 0 at u = 0 and increases: N² ∫_0^u (v F(v))^(N-1) dv for best-of-N, N² ∫_0^u ((1-v)(1-F(v)))^(N-1) dv for
        worst-of-N, u for one sample. A policy that is the tilt by its own influence is optimal.
        """
        u, n = unit_grid().nodes, self.n
        inner = (1 - u) * (1 - policy.cdf) if self.kind == "worst_of_n" else u * policy.cdf
        return n**2 * unit_grid().running_integral(inner ** (n - 1))
