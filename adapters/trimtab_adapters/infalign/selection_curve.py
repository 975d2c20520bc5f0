"""What best-of-n by a proxy reward gains in a gold reward, estimated for all n at once from one pool of samples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trimtab_adapters.infalign.unit_interval import FloatArray

_NORMAL_95 = 1.959963984540054


def best_of_n_gold(proxy: Sequence[float], gold: Sequence[float], max_n: int | None = None) -> FloatArray:
    """Unbiased estimates of E[gold of the best of n by proxy] for one prompt, n = 1 .. `max_n`.

    It is the mean over all subsets of n of the M samples: sorted by proxy, sample i is the best of C(i-1, n-1) of the
    C(M, n) subsets. Samples that tie in the proxy share the sum of their weights equally, as a fair choice would.

    Args:
        proxy: M >= 1 proxy rewards of independent samples of one policy for one prompt.
        gold: Their gold rewards, in the same order.
        max_n: Largest n, at most M; M when None.

    Returns:
        [max_n].

    Raises:
        ValueError: Lengths differ, no sample, a reward that is not finite, or `max_n` out of range.
    """
    size = len(proxy)
    if size == 0 or len(gold) != size:
        raise ValueError("a pool needs as many gold as proxy rewards, one at least")
    scores, golds = np.asarray(proxy, dtype=np.float64), np.asarray(gold, dtype=np.float64)
    if not (np.isfinite(scores).all() and np.isfinite(golds).all()):
        raise ValueError("a reward of the pool is not finite")
    most = size if max_n is None else max_n
    if not 1 <= most <= size:
        raise ValueError("n lies between 1 and the number of samples")
    _, block, counts = np.unique(scores, return_inverse=True, return_counts=True)
    mean_of_block = np.bincount(block, weights=golds) / counts
    ranked = mean_of_block[np.sort(block)]
    estimates = np.empty(most)
    weights = np.full(size, 1 / size)
    rank = np.arange(1, size + 1)
    for n in range(1, most + 1):
        estimates[n - 1] = weights @ ranked
        # From C(i-1, n-1) / C(M, n) to the next n by a factor; products of positive numbers lose no digits.
        if n < size:
            weights = weights * np.maximum(rank - n, 0) / n * ((n + 1) / (size - n))
    return estimates


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Best-of-n for one n, as a mean over prompts with its 95 % interval (normal, over prompts).

    Attributes:
        n: Candidates.
        kl: log n - (n-1)/n nats: the KL of best-of-n without ties, an upper bound with them.
        gold: Mean gold reward of the chosen candidate.
        gain: Mean over prompts of how much more that is than for n = 1.
        gold_low: Lower end of the interval of `gold`.
        gold_high: Upper end.
        gain_standard_error: Of `gain`; it is smaller than that of `gold`, for prompts differ less in their gains.
    """

    n: int
    kl: float
    gold: float
    gold_low: float
    gold_high: float
    gain: float
    gain_standard_error: float


def selection_curve(per_prompt: FloatArray) -> list[CurvePoint]:
    """Average per-prompt estimates into a curve.

    Args:
        per_prompt: [prompts, max_n], rows of `best_of_n_gold`; at least two prompts, all with the same largest n so
            that each point is about the same prompts.

    Raises:
        ValueError: Fewer than two prompts.
    """
    prompts, most = per_prompt.shape
    if prompts < 2:
        raise ValueError("an interval over prompts needs two prompts at least")
    gains = per_prompt - per_prompt[:, :1]
    gold, gain = per_prompt.mean(axis=0), gains.mean(axis=0)
    gold_error, gain_error = (x.std(axis=0, ddof=1) / math.sqrt(prompts) for x in (per_prompt, gains))
    return [
        CurvePoint(
            n=n,
            kl=math.log(n) - (n - 1) / n,
            gold=float(gold[n - 1]),
            gold_low=float(gold[n - 1] - _NORMAL_95 * gold_error[n - 1]),
            gold_high=float(gold[n - 1] + _NORMAL_95 * gold_error[n - 1]),
            gain=float(gain[n - 1]),
            gain_standard_error=float(gain_error[n - 1]),
        )
        for n in range(1, most + 1)
    ]
