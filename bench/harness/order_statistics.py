"""Estimates of what best-of-n does on the calibrated scale, and the exact values that they are held against.

Letters: P prompts; a winner's *rank* is the number of held-out samples of its prompt, of which there are `size`, that
score lower, 0 to `size`. Without ties the rank of a base sample is uniform, and that of the best of n has the
beta-binomial distribution with parameters `size`, n, 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln
from scipy.stats import betabinom

from trimtab_adapters.contract.best_of_n import kl_divergence

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its standard error over prompts."""

    value: float
    error: float

    def z(self, expected: float) -> float:
        """How many standard errors it lies above what was expected; 0 when both are exact and equal."""
        if self.error == 0:
            return 0.0 if math.isclose(self.value, expected) else math.inf
        return (self.value - expected) / self.error


def max_weights(num_samples: int, n: int) -> Floats:
    """Probability that the i-th smallest of `num_samples` is the largest of n drawn from them without putting back.

    Weighting sorted samples by it is unbiased for the best of n. `[num_samples]`, from the smallest to the largest.
    """
    if not 1 <= n <= num_samples:
        raise ValueError("n must be between 1 and the number of samples")

    def log_choose(a: Floats, b: int) -> Floats:
        return np.asarray(gammaln(a + 1) - gammaln(b + 1) - gammaln(a - b + 1), dtype=np.float64)

    below = np.arange(num_samples, dtype=np.float64)
    weights = np.zeros(num_samples)
    possible = below >= n - 1
    total = log_choose(np.array([float(num_samples)]), n)[0]
    weights[possible] = np.exp(log_choose(below[possible], n - 1) - total)
    return weights


def jackknife(rows: Floats, statistic: Callable[[Floats], float]) -> Estimate:
    """A statistic of the mean of rows, its bias taken off to first order, with its standard error over rows.

    Args:
        rows: `[prompts, ...]`, one independent row per prompt.
        statistic: Of the mean row.
    """
    num = len(rows)
    total = rows.sum(axis=0)
    full = statistic(total / num)
    without = np.array([statistic((total - row) / (num - 1)) for row in rows])
    error = math.sqrt((num - 1) / num * float(((without - without.mean()) ** 2).sum()))
    return Estimate(num * full - (num - 1) * float(without.mean()), error)


def rank_histogram(ranks: Floats, size: int, num_bins: int, weights: Floats | None = None) -> Floats:
    """Shares of ranks 0..size in bins of equal probability for the base; `size + 1` must be a multiple of the bins.

    The half of a rank between two ties is dropped.
    """
    width, rest = divmod(size + 1, num_bins)
    if rest:
        raise ValueError(f"{size + 1} ranks cannot be put into {num_bins} equal bins")
    bins = ranks.astype(np.int64) // width
    counts = np.bincount(bins, weights=weights, minlength=num_bins).astype(np.float64)
    return np.asarray(counts / counts.sum(), dtype=np.float64)


def binned_kl(shares: Floats) -> float:
    """KL in nats of shares in bins that are equally likely under the base."""
    return kl_divergence([float(share) for share in shares], [1 / len(shares)] * len(shares))


def expected_shares(size: int, n: int, num_bins: int) -> Floats:
    """What `rank_histogram` gives on average for the best of n, without ties."""
    probabilities = betabinom(size, n, 1).pmf(np.arange(size + 1))
    return np.asarray(probabilities.reshape(num_bins, -1).sum(axis=1), dtype=np.float64)
