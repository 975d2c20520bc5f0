import math

import numpy as np
import pytest
from scipy import stats

from trimtab_training.evaluation.intervals import IntervalMethod, Intervals


def test_the_standard_error_is_over_prompts() -> None:
    estimate = Intervals(method="t").mean([1.0, 2.0, 3.0, 6.0])
    error = math.sqrt((4 + 1 + 0 + 9) / 3 / 4)  # deviations from 3: variance over 4 - 1, of the mean of 4
    assert estimate.value == 3.0
    assert estimate.standard_error == pytest.approx(error)
    half = 3.182446305284263 * error  # Student's t at 97.5 % with 3 degrees of freedom, from the tables
    assert [estimate.low, estimate.high] == pytest.approx([3 - half, 3 + half])


def test_a_ratio_is_of_sums_with_its_linearised_error() -> None:
    numerators, denominators = np.array([1.0, 4.0, 1.0]), np.array([1.0, 2.0, 3.0])
    estimate = Intervals(method="t").ratio(numerators, denominators)
    assert estimate is not None
    assert estimate.value == 1.0  # 6 / 6
    # Residuals 0, 2, -2 over the mean denominator 2: 0, 1, -1; variance 2 / 2, of the mean of 3.
    assert estimate.standard_error == pytest.approx(math.sqrt(1 / 3))
    assert Intervals().ratio(numerators, np.zeros(3)) is None


def test_one_prompt_has_no_interval() -> None:
    estimate = Intervals().mean([0.7])
    assert (estimate.value, estimate.standard_error, estimate.low, estimate.high) == (0.7, None, None, None)


def test_prompts_that_all_agree_on_the_end_of_the_range_are_not_certainty() -> None:
    """Ten wins of ten: the exact interval starts where ten in ten still happen in 2.5 % of cases."""
    high = Intervals().mean([1.0] * 10, bounds=(0.0, 1.0))
    assert (high.value, high.high, high.method) == (1.0, 1.0, "exact")
    assert high.low == pytest.approx(0.025**0.1)
    assert high.low == pytest.approx(stats.binomtest(10, 10).proportion_ci(0.95).low)
    low = Intervals().mean([-1.0] * 10, bounds=(-1.0, 1.0))
    assert low.high == pytest.approx(-1 + 2 * (1 - 0.025**0.1))
    inside = Intervals().mean([0.5] * 10, bounds=(0.0, 1.0))
    assert (inside.low, inside.high, inside.method) == (0.5, 0.5, "none")


def test_the_same_numbers_give_the_same_interval_and_stay_in_the_range() -> None:
    values = np.random.default_rng(0).beta(9, 1, size=12)
    first, again = (Intervals(method="bca").mean(values, bounds=(0.0, 1.0)) for _ in range(2))
    assert first == again
    assert Intervals(method="bca", seed=1).mean(values) != first
    steep = Intervals(method="t").mean([1.0, 1.0, 1.0, 0.4], bounds=(0.0, 1.0))
    assert steep.high == 1.0


@pytest.mark.parametrize("method", ["bca", "percentile", "t"])
def test_intervals_cover_the_truth_about_as_often_as_they_say(method: IntervalMethod) -> None:
    """400 evaluations of 40 prompts whose win rates are Beta(4, 2), so 2/3 on average.

    Intervals for 40 skewed values cover a little less than 95 %. With a true coverage of 93 % fewer than 354 (88.5 %)
    of 400 have odds of about 1 in 2,500, and with 95 % more than 396 about 1 in 450,000; the seed is fixed besides.
    """
    rng = np.random.default_rng(3)
    intervals = Intervals(method=method, num_resamples=400)
    covered = 0
    for _ in range(400):
        estimate = intervals.mean(rng.beta(4, 2, size=40))
        assert estimate.low is not None
        assert estimate.high is not None
        covered += estimate.low <= 2 / 3 <= estimate.high
    assert 354 <= covered <= 396
