"""Best- and worst-of-n from a pool of samples, exactly: averages over all subsets without replacement (U-statistics).

A pool holds m independent samples of one policy for one prompt. The average of a quantity over all its subsets of size
n is unbiased for n <= m and has the least variance among unbiased estimates (Hoeffding 1948), so nothing is drawn
twice and nothing is drawn at random here.
"""

from functools import lru_cache
from math import comb

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from trimtab_training.evaluation.procedures import Chosen

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def choice_weights(rewards: Floats, chosen: Chosen) -> Floats:
    """Probability that each sample is the one chosen from a random subset of size n, ties at random.

    The k-th of m from below is the best of C(k-1, n-1) of the C(m, n) subsets.

    Args:
        rewards: Of the pool, `[m]`.
        chosen: The best or the worst of n.

    Returns:
        Weights `[m]` that sum to 1.

    Raises:
        ValueError: n > m.
    """
    m, n = len(rewards), chosen.n
    _check_size(n, m)
    by_rank = _rank_weights(m, n)
    values, group, counts = np.unique(_signed(rewards, chosen), return_inverse=True, return_counts=True)
    sums = np.bincount(np.repeat(np.arange(len(values)), counts), weights=by_rank)
    return np.asarray((sums / counts)[group])


def disjoint_choice_weights(first: Floats, first_chosen: Chosen, second: Floats, second_chosen: Chosen) -> Floats:
    """Joint probability of both choices from random subsets of two pools that have no index in common.

    For pools whose samples of the same index are not independent: both sides of a comparison of a policy with itself,
    where they are the same sample, and policies that share their seeds. Subset A of the first pool and B of the second
    are averaged over all disjoint pairs. With `below` the samples that a choice beats, A has its choice at i and B at j
    in sum over c of C(g, c) C(a - g, n1 - 1 - c) C(b - c, n2 - 1) of the pairs, where a and b count the samples below i
    and j without j and i, g those below both, and c how many of these A takes.

    Args:
        first: Rewards of the first pool, `[m]`.
        first_chosen: How its choice is made.
        second: Rewards of the second pool, `[m]`.
        second_chosen: Likewise.

    Returns:
        Weights `[m, m]` that sum to 1, with a diagonal of 0. Among ties the later index is chosen, which is as good as
        chance because samples are exchangeable.

    Raises:
        ValueError: n1 + n2 > m, or the pools differ in size.
    """
    if len(first) != len(second):
        raise ValueError("the pools differ in size")
    m, n1, n2 = len(first), first_chosen.n, second_chosen.n
    _check_size(n1 + n2, m)
    if n1 > n2:  # the sum over c has n1 terms
        return disjoint_choice_weights(second, second_chosen, first, first_chosen).T
    below_first, below_second = _beats(first, first_chosen), _beats(second, second_chosen)
    both = (below_first.astype(np.float64) @ below_second.T.astype(np.float64)).astype(np.int64)
    only_first = below_first.sum(axis=1)[:, None] - below_first - both
    of_second = below_second.sum(axis=1)[None, :] - below_second.T
    log_total = _log_combs(m, n1)[m] + _log_combs(m, n2)[m - n1]
    weights = np.zeros((m, m))
    for shared in range(n1):
        log_count = _log_combs(m, shared)[both] + _log_combs(m, n1 - 1 - shared)[only_first]
        weights += np.exp(log_count + _log_combs(m, n2 - 1)[np.maximum(of_second - shared, -1)] - log_total)
    np.fill_diagonal(weights, 0.0)
    return weights


def wins(first: Floats, second: Floats) -> Floats:
    """1 where a reward of the first is larger than one of the second, ½ where they are equal: `[m1, m2]`."""
    difference = first[:, None] - second[None, :]
    return np.asarray((difference > 0) + 0.5 * (difference == 0))


@lru_cache(maxsize=256)
def _rank_weights(m: int, n: int) -> Floats:
    return np.array([comb(k, n - 1) / comb(m, n) for k in range(m)])


def _signed(rewards: Floats, chosen: Chosen) -> Floats:
    return rewards if chosen.extreme == "best" else -rewards


def _beats(rewards: Floats, chosen: Chosen) -> Bools:
    """Whether sample i (row) is chosen over sample j (column); a total order."""
    order = np.argsort(_signed(rewards, chosen), kind="stable")
    rank = np.empty(len(rewards), dtype=np.int64)
    rank[order] = np.arange(len(rewards))
    return np.asarray(rank[:, None] > rank[None, :])


@lru_cache(maxsize=1024)
def _log_combs(m: int, k: int) -> Floats:
    """log C(n, k) at index n for n = 0 .. m, and at m + 1, so at index -1 as well, for a negative n."""
    n = np.arange(m + 2)
    n[-1] = -1
    is_possible = n >= k
    possible = np.where(is_possible, n, k).astype(np.float64)
    value = gammaln(possible + 1) - gammaln(k + 1.0) - gammaln(possible - k + 1)
    return np.asarray(np.where(is_possible, value, -np.inf))


def _check_size(needed: int, m: int) -> None:
    if needed > m:
        raise ValueError(f"{needed} different samples are needed and there are {m}")
