"""Closed forms of tilts on the calibrated scale; quadrature (`tilted.py`) must agree with them.

λ is 1/β throughout. Derivations are integrals of e^{λΦ(u)} over [0, 1]; the logarithm's policy is best-of-n's, whose KL
and win rate are those of arXiv 2401.01879 without ties.
"""

import math

from scipy.special import beta as beta_function
from scipy.special import comb, exp1, expi


def identity_win_rate(lam: float) -> float:
    """Win rate of one sample of the tilt by u: 1/(1 - e^{-λ}) - 1/λ."""
    if lam < 1e-3:
        return 0.5 + lam / 12  # The next term is λ³/720: below 2e-12, where the difference loses as much.
    return -1 / math.expm1(-lam) - 1 / lam


def identity_kl(lam: float) -> float:
    """KL of the tilt by u: λ win - log((e^λ - 1)/λ)."""
    if lam < 1e-3:
        return lam**2 / 24
    return lam * identity_win_rate(lam) - identity_log_partition(lam)


def identity_log_partition(lam: float) -> float:
    """log ∫ e^{λu} = log((e^λ - 1)/λ), the log Z of quantile-reward regression."""
    return lam + math.log(-math.expm1(-lam) / lam)


def log_samples(lam: float) -> float:
    """n = 1 + λ of the best-of-n policy that is the tilt by log u; need not be whole."""
    return 1 + lam


def log_kl(n: float) -> float:
    """KL of the tilt by log u: log n - (n-1)/n."""
    return math.log(n) - (n - 1) / n


def log_win_rate(n: float) -> float:
    """Win rate n/(n+1) of the tilt by log u, under one sample and under best-of-N for every N."""
    return n / (n + 1)


def log_worst_of(n: float, worst_of: int) -> float:
    """Win rate of the tilt by log u under worst-of-N: N Σ_j C(N,j) (-1)^j B(nj + 1, N).

    The terms alternate and grow with N: 10 digits are left at N = 16, 5 at N = 32. Use quadrature above.
    """
    terms = [
        (-1) ** j * comb(worst_of, j, exact=True) * beta_function(n * j + 1, worst_of) for j in range(worst_of + 1)
    ]
    return worst_of * math.fsum(terms)


def exponential_log_partition(t: float, lam: float) -> float:
    """log ∫ e^{λ sign(t) e^{tu}}, Φ not normalised: by Ei for t > 0 and by E1 for t < 0.

    Raises:
        ValueError: λ e^t above 700 for t > 0: a float overflows. Quadrature does not.
    """
    if t > 0:
        _check_exponent(lam * math.exp(t))
        return math.log((expi(lam * math.exp(t)) - expi(lam)) / t)
    return math.log((exp1(lam * math.exp(t)) - exp1(lam)) / -t)


def exponential_mean(t: float, lam: float) -> float:
    """E[Φ] of the tilt by Φ = sign(t) e^{tu}, Φ not normalised. Raises as `exponential_log_partition` does."""
    z = math.exp(exponential_log_partition(t, lam))
    if t > 0:
        return (math.exp(lam * math.exp(t)) - math.exp(lam)) / (lam * t * z)
    return (math.exp(-lam) - math.exp(-lam * math.exp(t))) / (lam * -t * z)


def exponential_kl(t: float, lam: float) -> float:
    """KL of the tilt by Φ = sign(t) e^{tu}: λ E[Φ] - log Z.

    The policy of Φ normalised to [0, 1] with weight β has λ = 1/(β |e^t - 1|). Raises as `exponential_log_partition`.
    """
    return lam * exponential_mean(t, lam) - exponential_log_partition(t, lam)


def _check_exponent(exponent: float) -> None:
    if exponent > 700:
        raise ValueError("lambda e^t is too large for the closed form")
