"""Figures of a set of generated texts. Pure functions of plain values."""

import math
import re
import statistics
from collections.abc import Sequence
from typing import Final, NamedTuple

_WORD: Final = re.compile(r"\w+(?:'\w+)?")
_Z_95: Final = statistics.NormalDist().inv_cdf(0.975)


class Interval(NamedTuple):
    """A mean with the half width of its 95 % interval."""

    mean: float
    half_width: float


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval by the normal approximation, `1.96 s / sqrt(n)` with the sample's s.

    The half width of a single value is infinite: one value says nothing about spread.

    Raises:
        ValueError: No value.
    """
    if not values:
        raise ValueError("the mean of no values is not defined")
    if len(values) == 1:
        return Interval(values[0], math.inf)
    return Interval(statistics.fmean(values), _Z_95 * statistics.stdev(values) / math.sqrt(len(values)))


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Different word n-grams over all word n-grams of all texts together (Li et al. 2016); NaN when there are none.

    It falls as texts grow in number, so only sets of about the same size can be compared.
    """
    grams = [gram for text in texts for gram in _grams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def repetition(texts: Sequence[str], n: int = 2) -> float:
    """Mean over texts of the share of word n-grams that repeat an earlier one of the same text; in [0, 1).

    Texts of fewer than n words are left out; NaN when none is left.
    """
    shares = [1.0 - len(set(grams)) / len(grams) for text in texts if (grams := _grams(words(text), n))]
    return statistics.fmean(shares) if shares else math.nan


def perplexity(logprobs: Sequence[Sequence[float]]) -> float:
    """`exp` of the mean negative log-probability per token over all texts together; NaN when there is no token.

    Args:
        logprobs: For each text the natural log-probabilities of its tokens, under the model that is asked.
    """
    mean = token_mean(logprobs)
    return math.exp(-mean) if not math.isnan(mean) else mean


def token_mean(values: Sequence[Sequence[float]]) -> float:
    """Mean over all tokens of all texts together; NaN when there is no token."""
    flat = [value for row in values for value in row]
    return math.fsum(flat) / len(flat) if flat else math.nan


def best_of_n_kl_bound(n: int) -> float:
    """Upper bound `log n - (n - 1) / n` on KL(best-of-n || one sample), in nats per answer (Beirami et al. 2024).

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"best-of-n needs n >= 1, not {n}")
    return math.log(n) - (n - 1) / n


def _grams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
