"""What a policy's outputs are like, beside their rewards: likelihood, variety, length, refusals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from trimtab_training.evaluation.diversity import distinct_n, repeat_rate
from trimtab_training.evaluation.intervals import Estimate, Intervals
from trimtab_training.evaluation.refusals import is_refusal
from trimtab_training.evaluation.token_sums import TokenSums
from trimtab_training.rollouts import Sample

Floats = NDArray[np.float64]

UNIT = (0.0, 1.0)
_NGRAMS = (1, 2, 3)
_LARGEST_EXPONENT = 700.0


@dataclass(frozen=True, slots=True)
class Texts:
    """Samples of one policy reduced to what figures are made of, `[prompts]` or `[prompts, samples]` each.

    Attributes:
        num_read: Tokens that the models read, per prompt.
        nll: Sum of the negative log-probabilities of these under the base.
        entropy: Sum of the entropies of the policy that drew them, at their positions.
        distinct: Different n-grams over all n-grams of a prompt's outputs, for n = 1, 2, 3; NaN without any.
        repeats: Share of equal pairs among a prompt's outputs; NaN with a single output.
        lengths: Tokens of each output.
        refusals: 1 for each output that is a refusal, 0 for the others.
    """

    num_read: Floats
    nll: Floats
    entropy: Floats
    distinct: tuple[Floats, Floats, Floats]
    repeats: Floats
    lengths: Floats
    refusals: Floats

    @classmethod
    def of(
        cls,
        samples: Sequence[Sequence[Sample]],
        sums: TokenSums,
        *,
        is_steered: bool,
        refusal_phrases: Sequence[str],
    ) -> "Texts":
        """Reduce samples; `sums` are of the same, one prompt after the other."""
        shape = (len(samples), len(samples[0]))
        entropy = sums.steered_entropy if is_steered else sums.base_entropy
        ids = [[sample.output_token_ids for sample in group] for group in samples]
        first, second, third = (np.array([_or_nan(distinct_n(group, n)) for group in ids]) for n in _NGRAMS)
        return cls(
            num_read=sums.num_tokens.reshape(shape).sum(axis=1),
            nll=-sums.base_logprob.reshape(shape).sum(axis=1),
            entropy=entropy.reshape(shape).sum(axis=1),
            distinct=(first, second, third),
            repeats=np.array([_or_nan(repeat_rate(group)) for group in ids]),
            lengths=np.array([[len(output) for output in group] for group in ids], dtype=np.float64),
            refusals=np.array(
                [[is_refusal(sample.output, refusal_phrases) for sample in group] for group in samples],
                dtype=np.float64,
            ),
        )


@dataclass(frozen=True, slots=True)
class TextFigures:
    """Of one policy. None where nothing could be measured.

    Attributes:
        base_perplexity: Of the outputs under the base: exp of the mean negative log-probability per token.
        entropy_per_token: Of the policy's next-token distribution along its own outputs, in nats.
        distinct_1: Different tokens over all tokens of the outputs for a prompt, mean over prompts.
        distinct_2: Likewise of pairs of neighbours.
        distinct_3: Likewise of triples.
        repeat_rate: Probability that two outputs for the same prompt are the same.
        mean_tokens: Length of an output.
        refusal_share: Share of outputs with a phrase of refusal.
    """

    base_perplexity: Estimate | None
    entropy_per_token: Estimate | None
    distinct_1: Estimate | None
    distinct_2: Estimate | None
    distinct_3: Estimate | None
    repeat_rate: Estimate | None
    mean_tokens: Estimate
    refusal_share: Estimate


@dataclass(frozen=True, slots=True)
class TextShifts:
    """The steered policy against the base, prompt by prompt. None where nothing could be measured.

    Attributes:
        perplexity_ratio: Perplexity under the base of the steered outputs over that of the base's own.
        distinct_1_ratio: Steered over base.
        distinct_2_ratio: Likewise.
        distinct_3_ratio: Likewise.
        length_difference: Tokens of a steered output minus those of a base output.
        length_ratio: The same as a quotient of means.
        refusal_shift: Share of refusals, steered minus base.
    """

    perplexity_ratio: Estimate | None
    distinct_1_ratio: Estimate | None
    distinct_2_ratio: Estimate | None
    distinct_3_ratio: Estimate | None
    length_difference: Estimate
    length_ratio: Estimate | None
    refusal_shift: Estimate


def text_figures(texts: Texts, intervals: Intervals) -> TextFigures:
    """Figures of one policy's outputs."""
    first, second, third = (_measured(intervals, column, UNIT) for column in texts.distinct)
    return TextFigures(
        base_perplexity=_exponential(_quotient(intervals, texts.nll, texts.num_read)),
        entropy_per_token=_quotient(intervals, texts.entropy, texts.num_read),
        distinct_1=first,
        distinct_2=second,
        distinct_3=third,
        repeat_rate=_measured(intervals, texts.repeats, UNIT),
        mean_tokens=intervals.mean(texts.lengths.mean(axis=1)),
        refusal_share=intervals.mean(texts.refusals.mean(axis=1), bounds=UNIT),
    )


def text_shifts(base: Texts, steered: Texts, intervals: Intervals) -> TextShifts:
    """What steering did to the outputs."""
    first, second, third = (
        _quotient(intervals, np.nan_to_num(ours), np.where(np.isnan(ours), np.nan, theirs))
        for ours, theirs in zip(steered.distinct, base.distinct, strict=True)
    )
    lengths = steered.lengths.mean(axis=1), base.lengths.mean(axis=1)
    return TextShifts(
        perplexity_ratio=_exponential(_nll_difference(base, steered, intervals)),
        distinct_1_ratio=first,
        distinct_2_ratio=second,
        distinct_3_ratio=third,
        length_difference=intervals.mean(lengths[0] - lengths[1]),
        length_ratio=_quotient(intervals, *lengths),
        refusal_shift=intervals.mean((steered.refusals - base.refusals).mean(axis=1), bounds=(-1.0, 1.0)),
    )


def rank_correlation(first: Floats, second: Floats, intervals: Intervals) -> Estimate | None:
    """Spearman's rank correlation over all outputs, resampled by prompts; None where one of both never changes.

    Ranks are those among all outputs, also within a resample.

    Args:
        first: `[prompts, samples]`.
        second: Likewise.
        intervals: Makes the error.
    """
    ranks = [rankdata(values.ravel()).reshape(values.shape) for values in (first, second)]
    if any(np.ptp(values) == 0 for values in ranks):
        return None
    x, y = ((values - values.mean()) / values.std() for values in ranks)
    sums = [part.sum(axis=1) for part in (np.ones_like(x), x, y, x * x, y * y, x * y)]
    return intervals.statistic(_correlation, *sums)


def _correlation(*columns: Floats, axis: int = -1) -> Floats:
    num, x, y, xx, yy, xy = (column.sum(axis=axis) for column in columns)
    spread = (xx / num - (x / num) ** 2) * (yy / num - (y / num) ** 2)
    together = xy / num - x * y / num**2
    return np.asarray(np.where(spread > 1e-12, together / np.sqrt(np.maximum(spread, 1e-12)), 0.0))


def _nll_difference(base: Texts, steered: Texts, intervals: Intervals) -> Estimate | None:
    """Mean negative log-probability per token under the base, steered outputs minus base outputs."""
    kept = (base.num_read > 0) & (steered.num_read > 0)
    if not kept.any():
        return None

    def difference(*columns: Floats, axis: int = -1) -> Floats:
        nll, num, other_nll, other_num = (column.sum(axis=axis) for column in columns)
        return np.asarray(nll / num - other_nll / other_num)

    columns = (steered.nll, steered.num_read, base.nll, base.num_read)
    return intervals.statistic(difference, *(column[kept] for column in columns))


def _quotient(intervals: Intervals, numerators: Floats, denominators: Floats) -> Estimate | None:
    """Sum over sum of the prompts that have something to divide by."""
    kept = denominators > 0  # False for NaN
    return intervals.ratio(numerators[kept], denominators[kept])


def _measured(intervals: Intervals, values: Floats, bounds: tuple[float, float]) -> Estimate | None:
    """Mean over the prompts that have a value."""
    kept = ~np.isnan(values)
    return intervals.mean(values[kept], bounds=bounds) if kept.any() else None


def _exponential(estimate: Estimate | None) -> Estimate | None:
    """The same of exp(quantity); None beyond what a float holds."""
    if estimate is None or max(estimate.value, estimate.high or 0.0) > _LARGEST_EXPONENT:
        return None

    def exp(end: float | None) -> float | None:
        return None if end is None else math.exp(end)

    value = math.exp(estimate.value)
    error = None if estimate.standard_error is None else value * estimate.standard_error
    return replace(estimate, value=value, standard_error=error, low=exp(estimate.low), high=exp(estimate.high))


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
