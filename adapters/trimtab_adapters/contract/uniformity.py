"""Are calibrated rewards of samples of the reference policy uniform on [0, 1]? If and only if there are no ties.

With ties the half-tie value lumps at the middle of each tie and its distribution function has steps, so its distance
from the diagonal is at least half the probability of the largest tie. Broken at random, ties leave it uniform again:
the test is made on those values.
"""

from collections.abc import Sequence

import numpy as np
from scipy.stats import kstwo


def ks_distance(values: Sequence[float]) -> float:
    """Largest distance between the empirical distribution function of values in [0, 1] and the diagonal.

    Raises:
        ValueError: There is none.
    """
    if len(values) == 0:
        raise ValueError("there are no values")
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    n = len(ordered)
    below, above = ordered - np.arange(n) / n, np.arange(1, n + 1) / n - ordered
    return float(max(below.max(), above.max()))


def ks_critical(num_values: int, *, alpha: float = 0.05) -> float:
    """The distance that n independent uniform values exceed with probability `alpha` (Kolmogorov's exact law)."""
    return float(kstwo.ppf(1 - alpha, num_values))


def randomised_rank(below: int, equal: int, size: int, uniform: float) -> float:
    """A rank among `size` samples of the same distribution, ties broken at random: uniform on [0, 1] exactly.

    Args:
        below: Samples that are lower.
        equal: Samples that are equal.
        size: All of them.
        uniform: A draw from [0, 1), independent of everything.
    """
    return (below + uniform * (equal + 1)) / (size + 1)


def coverage(values: Sequence[float], levels: Sequence[float]) -> list[tuple[float, float]]:
    """For each nominal level the share of values that are not above it; equal in the long run for uniform values."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    found = np.searchsorted(ordered, np.asarray(levels), "right") / len(ordered)
    return list(zip(levels, found.tolist(), strict=True))
