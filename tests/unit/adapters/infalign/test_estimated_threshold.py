"""Stopping by estimated calibrated rewards: closed forms, simulation, and what the error of the estimate costs."""

import math

import numpy as np
import pytest

from trimtab_adapters.infalign.adaptive import ThresholdStopping, threshold_for_price, threshold_for_win_rate
from trimtab_adapters.infalign.estimated_threshold import (
    EstimatedThreshold,
    estimated_threshold_for_price,
    estimated_threshold_for_win_rate,
)


@pytest.mark.parametrize(("j", "k"), [(3, 4), (13, 16), (50, 64)])
def test_with_a_large_cap_it_is_the_mean_of_an_order_statistic(j: int, k: int) -> None:
    # Uncapped and one by one, a threshold u wins (1 + u) / 2, and the j-th smallest of k has the mean j / (k + 1).
    assert EstimatedThreshold(j, k, 100_000).win_rate == pytest.approx((1 + j / (k + 1)) / 2, abs=2e-4)


@pytest.mark.parametrize(("j", "k", "cap", "wave"), [(13, 16, 20, 1), (6, 8, 16, 2), (50, 64, 20, 4), (0, 5, 8, 3)])
def test_it_is_what_a_simulation_sees(j: int, k: int, cap: int, wave: int) -> None:
    # 20,000 runs; bands of 4.5 standard errors on 8 quantities: one false alarm in 18,000 seeds, and this one is fixed.
    rng = np.random.default_rng(7)
    wins, draws = [], []
    for _ in range(20_000):
        rollouts = np.sort(rng.random(k))
        best, drawn = 0.0, 0
        while drawn < cap:
            values = rng.random(min(wave, cap - drawn))
            drawn += len(values)
            best = max(best, float(values.max()))
            if np.searchsorted(rollouts, values.max()) >= j:
                break
        wins.append(best)
        draws.append(drawn)
    stopping = EstimatedThreshold(j, k, cap, wave)
    assert abs(float(np.mean(wins)) - stopping.win_rate) <= 4.5 * float(np.std(wins)) / math.sqrt(20_000)
    assert abs(float(np.mean(draws)) - stopping.expected_draws) <= 4.5 * float(np.std(draws)) / math.sqrt(20_000)


@pytest.mark.parametrize("k", [16, 64, 256])
def test_the_threshold_for_a_win_rate_is_the_smallest_that_reaches_it(k: int) -> None:
    for wave in (1, 2):
        threshold = estimated_threshold_for_win_rate(8 / 9, 20, wave, k)
        j = round(threshold * k)
        assert EstimatedThreshold(j, k, 20, wave).win_rate >= 8 / 9 > EstimatedThreshold(j - 1, k, 20, wave).win_rate


def test_fewer_rollouts_need_a_higher_threshold_and_more_draws() -> None:
    exact = threshold_for_win_rate(8 / 9, 20)
    thresholds, draws = [], []
    for k in (16, 64, 256):
        thresholds.append(estimated_threshold_for_win_rate(8 / 9, 20, 1, k))
        draws.append(EstimatedThreshold(round(thresholds[-1] * k), k, 20).expected_draws)
    assert thresholds[0] > thresholds[1] > thresholds[2] > exact
    assert draws[0] > draws[1] > draws[2] > ThresholdStopping(exact, 20).expected_draws


def test_many_rollouts_are_as_good_as_exact_values() -> None:
    assert estimated_threshold_for_win_rate(0.85, 20, 2, 1024) == pytest.approx(
        threshold_for_win_rate(0.85, 20, 2), abs=3e-3
    )
    assert estimated_threshold_for_price(0.02, 20, 1, 1024) == pytest.approx(threshold_for_price(0.02), abs=4e-3)


@pytest.mark.parametrize("price", [0.005, 0.02, 0.1, 0.6])
def test_the_threshold_for_a_price_is_the_best_of_all(price: float) -> None:
    def net(j: int) -> float:
        stopping = EstimatedThreshold(j, 16, 12, 2)
        return stopping.win_rate - price * stopping.expected_draws

    best = max(range(17), key=net)
    assert estimated_threshold_for_price(price, 12, 2, 16) == best / 16


def test_what_cannot_be_reached_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="the cap allows"):
        estimated_threshold_for_win_rate(0.9, 4, 1, 64)
    with pytest.raises(ValueError, match="2 reference rollouts and cap allow"):
        estimated_threshold_for_win_rate(0.94, 20, 1, 2)
    with pytest.raises(ValueError, match="0 to K"):
        EstimatedThreshold(5, 4, 8)
    with pytest.raises(ValueError, match="positive"):
        estimated_threshold_for_price(0.0, 8, 1, 16)
