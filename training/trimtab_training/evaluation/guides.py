"""Curves that theory draws into the plane of KL and win rate, for rewards without ties."""

import numpy as np

from trimtab_adapters.infalign.closed_forms import log_kl, log_win_rate
from trimtab_adapters.infalign.optimal import solve_optimal
from trimtab_adapters.infalign.procedures import Procedure, ProcedureKind
from trimtab_training.evaluation.procedures import Chosen

_BETAS = np.geomspace(32.0, 1e-3, 90)
_TOLERANCE = 1e-4
"""Of the optimum's log-density in nats: nothing that can be seen in a picture."""
_ALL_WON = 0.9995

Curve = tuple[list[float], list[float]]


def best_of_n_curve(largest_kl: float) -> Curve:
    """KL and win rate of the best-of-n policy, n from 1 on and any real number: log n - (n - 1) / n and n / (n + 1).

    The win rate is the same over one sample of the reference policy and under best-of-N on both sides for every N.
    """
    numbers = np.exp(np.linspace(0, 1, 200) ** 2 * (largest_kl + 1))
    points = [(log_kl(n), log_win_rate(n)) for n in numbers if log_kl(n) <= largest_kl]
    return [kl for kl, _ in points], [win for _, win in points]


def optimum_curve(chosen: Chosen, largest_kl: float) -> Curve:
    """KL and the largest win rate that any policy of this KL has over the reference under a procedure (InfAlign).

    It ends where nearly all is won or the optimum can no longer be computed. For one sample on both sides the optimum
    is the tilt by the calibrated reward.
    """
    kind: ProcedureKind = "best_of_n" if chosen.extreme == "best" else "worst_of_n"
    procedure = Procedure("standard") if chosen.n == 1 else Procedure(kind, chosen.n)
    kls, wins, start = [0.0], [0.5], None
    for beta in _BETAS:
        try:
            policy = solve_optimal(procedure, float(beta), start=start, tolerance=_TOLERANCE)
        except ArithmeticError:
            break
        if policy.kl > largest_kl or policy.win_rate > _ALL_WON:
            break
        kls.append(policy.kl)
        wins.append(policy.win_rate)
        start = policy.ranks
    return kls, wins
