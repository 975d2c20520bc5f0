import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import spearmanr

from trimtab_training.evaluation.diversity import distinct_n, repeat_rate
from trimtab_training.evaluation.intervals import Intervals
from trimtab_training.evaluation.refusals import REFUSAL_PHRASES, is_refusal
from trimtab_training.evaluation.text_figures import Floats, Texts, rank_correlation, text_figures, text_shifts
from trimtab_training.evaluation.token_sums import TokenSums
from trimtab_training.rollouts import Sample

INTERVALS = Intervals("percentile", num_resamples=200)


def texts_of(
    pools: Sequence[Sequence[tuple[int, ...]]],
    *,
    nll: float = 1.0,
    entropy: float = 0.5,
    outputs: Sequence[Sequence[str]] | None = None,
    num_read: Sequence[float] | None = None,
) -> Texts:
    """Pools of outputs whose every token has this negative log-probability and entropy."""
    words = outputs or [["x"] * len(pool) for pool in pools]
    samples = [
        [Sample("p", (1,), text, ids) for text, ids in zip(row, pool, strict=True)]
        for row, pool in zip(words, pools, strict=True)
    ]
    lengths = np.array([len(ids) for pool in pools for ids in pool], dtype=np.float64)
    read = lengths if num_read is None else np.array(num_read)
    zeros = np.zeros_like(read)
    sums = TokenSums(read, -nll * read, zeros, zeros, zeros, entropy * read)
    return Texts.of(samples, sums, is_steered=True, refusal_phrases=REFUSAL_PHRASES)


def test_distinct_n_is_over_all_outputs_of_a_prompt_together() -> None:
    # bigrams: 12 23 | 12 24 | none -> 3 of 4 differ
    assert distinct_n([(1, 2, 3), (1, 2, 4), (1,)], 2) == 0.75
    assert distinct_n([(1,)], 2) is None


def test_the_repeat_rate_is_the_share_of_equal_pairs() -> None:
    # of four outputs, three are the same: 3 of 6 pairs
    assert repeat_rate([(1,), (1,), (2,), (1,)]) == 0.5
    assert repeat_rate([(1,), (2,)]) == 0.0
    assert repeat_rate([(1,)]) is None


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("I'm sorry, but no.", True),
        ("Well, I\u2019M  SORRY", True),
        ("I can\nnot do it", True),
        ("Sorry seems to be the hardest word", False),
        ("", False),
    ],
)
def test_refusals_are_told_by_phrase_whatever_case_apostrophe_and_space(output: str, expected: bool) -> None:
    assert is_refusal(output, REFUSAL_PHRASES) is expected


def test_perplexity_and_entropy_are_per_token_over_all_prompts() -> None:
    """Prompts of 4 tokens at 1 nat and 12 at 2 nats: 28 / 16 nats per token, not the mean of 1 and 2."""
    short, long = texts_of([[(1, 2), (3, 4)]], nll=1.0), texts_of([[(1,) * 6, (2,) * 6]], nll=2.0)
    both = Texts(
        np.append(short.num_read, long.num_read),
        np.append(short.nll, long.nll),
        np.append(short.entropy, long.entropy),
        tuple(np.append(a, b) for a, b in zip(short.distinct, long.distinct, strict=True)),  # type: ignore[arg-type]
        np.append(short.repeats, long.repeats),
        np.vstack([short.lengths, long.lengths]),
        np.vstack([short.refusals, long.refusals]),
    )
    figures = text_figures(both, INTERVALS)
    assert figures.base_perplexity is not None
    assert figures.base_perplexity.value == pytest.approx(math.exp(28 / 16))
    # Two prompts: a resample has the one twice, both, or the other twice.
    assert figures.base_perplexity.low == pytest.approx(math.exp(1.0))
    assert figures.base_perplexity.high == pytest.approx(math.exp(2.0))
    assert figures.entropy_per_token is not None
    assert figures.entropy_per_token.value == pytest.approx(0.5)
    assert figures.mean_tokens.value == 4.0


def test_what_the_models_cannot_read_has_no_perplexity_but_a_length() -> None:
    pools: list[list[tuple[int, ...]]] = [[(1, 2), (1, 2)], [(3,), ()]]
    figures = text_figures(texts_of(pools, num_read=[0, 0, 0, 0]), INTERVALS)
    assert figures.base_perplexity is None
    assert figures.entropy_per_token is None
    assert figures.mean_tokens.value == 1.25


def test_a_perplexity_that_no_float_holds_is_none() -> None:
    assert text_figures(texts_of([[(1, 2)]], nll=800.0), INTERVALS).base_perplexity is None


def test_variety_is_the_mean_over_the_prompts_that_have_any() -> None:
    pools: list[list[tuple[int, ...]]] = [[(1, 2, 3), (1, 2, 4)], [(5, 5, 5), (5, 5, 5)], [(1,), (2,)]]
    figures = text_figures(texts_of(pools), INTERVALS)
    # distinct-1: 4/6, 1/6, 2/2; distinct-2: 3/4, 1/4, none; distinct-3: 2/2, 1/2, none; repeats 0, 1, 0
    assert figures.distinct_1 is not None
    assert figures.distinct_2 is not None
    assert figures.distinct_3 is not None
    assert figures.repeat_rate is not None
    assert figures.distinct_1.value == pytest.approx((4 / 6 + 1 / 6 + 1) / 3)
    assert figures.distinct_2.value == pytest.approx(0.5)
    assert figures.distinct_3.value == pytest.approx(0.75)
    assert figures.repeat_rate.value == pytest.approx(1 / 3)


def test_a_single_output_per_prompt_has_no_repeat_rate() -> None:
    assert text_figures(texts_of([[(1, 2)], [(3, 4)]]), INTERVALS).repeat_rate is None


def test_shifts_are_steered_against_base() -> None:
    base = texts_of([[(1, 2, 3, 4), (5, 6, 7, 8)], [(1, 2), (3, 4)]], outputs=[["fine", "I cannot"], ["a", "b"]])
    steered = texts_of(
        [[(1, 1, 1, 1), (1, 1, 1, 1)], [(9, 9), (9, 9)]],
        nll=1.5,
        outputs=[["I can't", "as an AI I will not"], ["a", "b"]],
    )
    shifts = text_shifts(base, steered, INTERVALS)
    assert shifts.perplexity_ratio is not None
    assert shifts.perplexity_ratio.value == pytest.approx(math.exp(0.5))
    assert shifts.distinct_2_ratio is not None
    # base 1 and 1; steered 1 of 6 and 1 of 2
    assert shifts.distinct_2_ratio.value == pytest.approx((1 / 6 + 1 / 2) / 2)
    assert shifts.distinct_3_ratio is not None  # of the first prompt alone
    assert shifts.distinct_3_ratio.value == pytest.approx(1 / 4)
    assert shifts.length_difference.value == 0.0
    assert shifts.length_ratio is not None
    assert shifts.length_ratio.value == 1.0
    # shares of refusals: prompt 0 from 1/2 to 1, prompt 1 none
    assert shifts.refusal_shift.value == pytest.approx(0.25)
    assert (shifts.refusal_shift.low, shifts.refusal_shift.high) == (0.0, 0.5)


def test_variety_is_compared_where_both_policies_have_any() -> None:
    base = texts_of([[(1, 2), (1, 2)], [(3, 4), (5, 6)]])
    steered = texts_of([[(1,), (2,)], [(3, 4), (3, 4)]])
    shifts = text_shifts(base, steered, INTERVALS)
    assert shifts.distinct_2_ratio is not None
    assert shifts.distinct_2_ratio.value == 0.5  # of the second prompt: 1/2 against 1
    assert shifts.distinct_3_ratio is None


def test_the_rank_correlation_is_spearmans_with_an_interval_around_it() -> None:
    rng = np.random.default_rng(1)
    first: Floats = rng.normal(size=(60, 3))
    noisy = np.exp(first + rng.normal(size=(60, 3)))
    second: Floats = np.asarray(noisy.round(1), dtype=np.float64)  # monotone with noise, and with ties
    estimate = rank_correlation(first, second, INTERVALS)
    assert estimate is not None
    assert estimate.value == pytest.approx(spearmanr(first.ravel(), second.ravel()).statistic)
    assert estimate.low is not None
    assert estimate.high is not None
    # 180 independent outputs: standard error about (1 - 0.68^2) / sqrt(180) = 0.04, so +-0.08; twice that at most.
    assert 0.04 < estimate.high - estimate.low < 0.32
    assert estimate.low < estimate.value < estimate.high


def test_a_reward_that_never_changes_has_no_correlation() -> None:
    assert rank_correlation(np.ones((4, 2)), np.linspace(0.0, 7.0, 8).reshape(4, 2), INTERVALS) is None


def test_a_statistic_has_the_jackknifes_error_and_the_bootstraps_ends() -> None:
    """Of a mean the jackknife's error is the usual one: deviations -2, -1, 0, 3; sqrt(14 / 3 / 4)."""
    values = np.array([1.0, 2.0, 3.0, 6.0])

    def mean(column: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.asarray(column.mean(axis=axis))

    estimate = INTERVALS.statistic(mean, values)
    assert estimate.value == 3.0
    assert estimate.standard_error == pytest.approx(math.sqrt(14 / 3 / 4))
    assert (estimate.low, estimate.high) == (INTERVALS.mean(values).low, INTERVALS.mean(values).high)
    assert INTERVALS.statistic(mean, values[:1]).low is None
    same = INTERVALS.statistic(mean, np.ones(3))
    assert (same.low, same.high, same.method) == (1.0, 1.0, "none")
