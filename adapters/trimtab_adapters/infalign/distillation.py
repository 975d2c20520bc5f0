"""Closed forms for training a policy to imitate best-of-n."""

import math


def bonbon_beta(n: int) -> float:
    """β_n = 1 / (2 (n-1) H_{n-1}) of the preference loss on best and worst of n (BoNBoN, arXiv 2406.00832).

    Raises:
        ValueError: n < 2: one sample has no worst.
    """
    if n < 2:
        raise ValueError("n must be at least 2")
    return 1 / (2 * (n - 1) * math.fsum(1 / i for i in range(1, n)))


def best_of_n_log_ratio(below: float, mass: float, n: int) -> float:
    """log(q / p) of one outcome between best-of-n and its base: log((F + p)^n - F^n) - log p.

    Divided by n it is the reward of variational best-of-n (arXiv 2407.06057), which writes the difference as
    Σ_{i=1..n} C(n,i) F^{n-i} p^i.

    Args:
        below: F, probability that the base scores strictly lower.
        mass: p > 0, probability that the base scores the same.
        n: Samples, >= 1.

    Raises:
        ValueError: One of them is out of range.
    """
    if n < 1 or below < 0 or mass <= 0 or below + mass > 1 + 1e-12:
        raise ValueError("n must be at least 1, F >= 0, p > 0 and F + p at most 1")
    total = below + mass
    missed = 0.0 if below == 0 else (below / total) ** n
    # 1 - (F / (F + p))^n by logarithms where p is small against F.
    once = 1 - missed if missed < 0.5 else -math.expm1(n * math.log1p(-mass / total))
    return n * math.log(total) + math.log(once) - math.log(mass)
