"""The arithmetic of the tasks' results."""

import math

import numpy as np
import pytest

from tasks.figures import (
    best_of,
    bootstrap,
    mean,
    mean_difference,
    ngram_credits,
    perplexity,
    perplexity_ratio,
    share_of_gain,
)


def test_the_interval_of_a_mean_is_that_of_the_binomial_where_values_are_0_and_1() -> None:
    values = np.array([1.0] * 30 + [0.0] * 70)
    found = bootstrap(mean, values, seed=0)
    # The resampled mean is Binomial(100, 0.3) / 100, whose 2.5 % and 97.5 % quantiles are 0.21 and 0.39. The quantiles
    # of 2,000 draws are off by more than one step of 0.01 with odds under 1e-4: at 0.20 and 0.22 the distribution
    # function is 0.0165 and 0.0479, 2.9 and 4.7 standard errors (0.0035, 0.0048) from 0.025; the seed is fixed besides.
    assert found.value == pytest.approx(0.3)
    assert found.low == pytest.approx(0.21, abs=0.0101)
    assert found.high == pytest.approx(0.39, abs=0.0101)


def test_paired_differences_are_resampled_together() -> None:
    base = np.arange(50, dtype=np.float64)
    found = bootstrap(mean_difference, base + 1.0, base, seed=1)
    # Every pair differs by exactly 1, however far apart the prompts are.
    assert found.as_list() == pytest.approx([1.0, 1.0, 1.0])


def test_perplexity_is_over_all_tokens_and_not_a_mean_over_prompts() -> None:
    nll, tokens = np.array([2.0, 8.0]), np.array([4.0, 1.0])
    assert perplexity(nll, tokens) == pytest.approx(math.exp(10 / 5))
    assert perplexity_ratio(nll, tokens, np.array([1.0, 1.0]), np.array([1.0, 3.0])) == pytest.approx(
        math.exp(2.0 - 0.5)
    )


def test_half_of_the_gain_is_a_share_of_a_half() -> None:
    base = np.array([0.1, 0.3])
    assert share_of_gain(base + 0.1, base + 0.2, base) == pytest.approx(0.5)


def test_credits_add_up_to_the_number_of_different_ngrams() -> None:
    credits, numbers = ngram_credits([(1, 2, 1, 2), (1, 2, 3), (9,)], 2)
    # Pairs: 12, 21, 12 | 12, 23 | none. 12 occurs three times, so the first output has 1/3 + 1 + 1/3.
    assert credits == pytest.approx([5 / 3, 4 / 3, 0.0])
    assert numbers.tolist() == [3, 2, 0]
    assert credits.sum() == pytest.approx(3)


def test_the_best_of_each_group_is_taken_and_the_first_of_equals() -> None:
    rewards = np.array([[0.1, 0.5, 0.9, 0.2, 7.0], [0.3, 0.3, 0.0, 0.0, 7.0]])
    # Groups of two of four; the fifth has no partner.
    assert best_of(rewards, 2).tolist() == [[1, 2], [0, 2]]
