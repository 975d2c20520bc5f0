"""The arithmetic of the results: bootstrap intervals over prompts, diversity, choices of best-of-N. Pure functions."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def as_list(self) -> list[float]:
        """Value, lower and upper end."""
        return [self.value, self.low, self.high]


def bootstrap(statistic: Callable[..., Any], *values: Floats, seed: int, num_resamples: int = 2000) -> Interval:
    """A statistic with its 95 % percentile bootstrap interval; prompts are resampled, for all arrays the same ones.

    Args:
        statistic: Takes arrays `[..., prompts]`, as many as there are `values`, and reduces their last axis.
        values: `[prompts]` each, two prompts or more.
        seed: Of the resampling.
        num_resamples: How many.
    """
    result = stats.bootstrap(
        values,
        lambda *arrays, axis: statistic(*arrays),
        paired=True,
        vectorized=True,
        n_resamples=num_resamples,
        confidence_level=0.95,
        method="percentile",
        rng=np.random.default_rng([seed, 5]),
    )
    interval = result.confidence_interval
    return Interval(float(statistic(*values)), float(interval.low), float(interval.high))


def mean(values: Floats) -> Floats:
    """Mean over the last axis."""
    return np.asarray(values.mean(axis=-1))


def mean_difference(values: Floats, base: Floats) -> Floats:
    """Mean of paired differences."""
    return np.asarray((values - base).mean(axis=-1))


def ratio(numerators: Floats, denominators: Floats) -> Floats:
    """Sum over sum."""
    return np.asarray(numerators.sum(axis=-1) / denominators.sum(axis=-1))


def ratio_difference(numerators: Floats, denominators: Floats, base: Floats, base_denominators: Floats) -> Floats:
    """One ratio less another."""
    return np.asarray(ratio(numerators, denominators) - ratio(base, base_denominators))


def perplexity(nll: Floats, num_tokens: Floats) -> Floats:
    """exp of the mean negative log-probability per token over all prompts together."""
    return np.asarray(np.exp(ratio(nll, num_tokens)))


def perplexity_ratio(nll: Floats, num_tokens: Floats, base_nll: Floats, base_num_tokens: Floats) -> Floats:
    """One perplexity over another."""
    return np.asarray(np.exp(ratio(nll, num_tokens) - ratio(base_nll, base_num_tokens)))


def share_of_gain(values: Floats, reached: Floats, base: Floats) -> Floats:
    """What `values` gain over `base`, as a share of what `reached` gains."""
    return np.asarray((values - base).mean(axis=-1) / (reached - base).mean(axis=-1))


def ngram_credits(outputs: Sequence[Sequence[int]], n: int) -> tuple[Floats, Floats]:
    """Each output's part in distinct-n of all outputs together.

    An n-gram that occurs m times gives each occurrence a credit of 1/m, so that all credits add up to the number of
    different n-grams, and distinct-n is the sum of credits over the sum of occurrences.

    Args:
        outputs: Token ids; as many outputs for each system that is compared, since distinct-n falls with their number.
        n: Length.

    Returns:
        Credits and occurrences, `[outputs]` each.
    """
    ngrams = [[tuple(output[i : i + n]) for i in range(len(output) - n + 1)] for output in outputs]
    counts = Counter(ngram for row in ngrams for ngram in row)
    credits = np.array([sum(1.0 / counts[ngram] for ngram in row) for row in ngrams])
    return credits, np.array([float(len(row)) for row in ngrams])


def best_of(rewards: Floats, num: int) -> NDArray[np.int64]:
    """The best of each `num` consecutive candidates, `[prompts, candidates]` -> `[prompts, candidates // num]`.

    Indices of candidates; of equal rewards the first wins.
    """
    num_prompts, num_candidates = rewards.shape
    num_groups = num_candidates // num
    groups = rewards[:, : num_groups * num].reshape(num_prompts, num_groups, num)
    return np.asarray(groups.argmax(axis=-1) + np.arange(num_groups) * num)
