import math

import numpy as np
import pytest
from scipy import stats

from trimtab_server.schedules.drift import compare_windows


def test_the_p_value_is_welchs() -> None:
    """By hand: means 0.5 and 0.2; the variance of [0, 1, 0.5] is 0.25, that of [0.1, 0.3, 0.2] is 0.01.

    t = (0.2 - 0.5) / sqrt(0.25 / 3 + 0.01 / 3) = -1.01903; degrees of freedom by Welch and Satterthwaite:
    (0.26 / 3)^2 / ((0.25 / 3)^2 / 2 + (0.01 / 3)^2 / 2) = 2.15974.
    """
    found = compare_windows([0.0, 1.0, 0.5], [0.1, 0.3, 0.2])
    assert [found.older_mean, found.newer_mean] == pytest.approx([0.5, 0.2])
    t = -0.3 / math.sqrt(0.26 / 3)
    freedom = (0.26 / 3) ** 2 / ((0.25 / 3) ** 2 / 2 + (0.01 / 3) ** 2 / 2)
    assert found.p_value == pytest.approx(float(stats.t.cdf(t, freedom)))


def test_only_a_fall_counts() -> None:
    rng = np.random.default_rng(0)
    low, high = rng.normal(0.0, 0.1, 50).tolist(), rng.normal(1.0, 0.1, 50).tolist()
    assert compare_windows(high, low).p_value < 1e-12
    assert compare_windows(low, high).p_value > 1.0 - 1e-12


def test_rewards_that_do_not_vary_are_compared_as_they_are() -> None:
    assert compare_windows([1.0] * 30, [1.0] * 30).p_value == 1.0
    assert compare_windows([1.0] * 30, [2.0] * 30).p_value == 1.0
    assert compare_windows([1.0] * 30, [0.5] * 30).p_value == 0.0


@pytest.mark.parametrize("shape", ["binary", "skewed"])
def test_false_alarms_come_as_often_as_they_are_said_to(shape: str) -> None:
    """4,000 pairs of windows of 50 without any change, at a level of 0.01.

    The number of alarms is binomial with mean 40 and deviation 6.3 when the level is exact. For rewards as far from
    normal as these it is not exact: 20 to 70 is allowed, which a level of 0.01 misses with odds below 1 in 1,000
    (four deviations), and one of 0.002 or 0.03 with odds above 0.999.
    """
    rng = np.random.default_rng(1)

    def window() -> list[float]:
        drawn = rng.random(50) < 0.3 if shape == "binary" else rng.exponential(size=50)
        return [float(value) for value in drawn]

    alarms = sum(compare_windows(window(), window()).p_value < 0.01 for _ in range(4000))
    assert 20 <= alarms <= 70


def test_a_fall_of_half_a_deviation_is_found_in_windows_of_two_hundred() -> None:
    """t is about 0.5 / sqrt(2 / 200) = 5 where 3.1 is needed: it is missed once in 35, so 10 of 12 in 1,000 tries."""
    rng = np.random.default_rng(2)
    found = [
        compare_windows(rng.normal(0.5, 1.0, 200).tolist(), rng.normal(0.0, 1.0, 200).tolist()).p_value < 0.001
        for _ in range(12)
    ]
    assert sum(found) >= 10
