"""Adaptive N by a threshold: tables, limits, waves against simulation, prices and matched win rates."""

import math

import numpy as np
import pytest

from trimtab_adapters.infalign.adaptive import ThresholdStopping, threshold_for_price, threshold_for_win_rate

# (τ, N): expected draws, win rate, KL.
TABLE = {
    (0.8, 4): (2.952, 0.79350, 0.62553),
    (0.9, 8): (5.695, 0.88543, 1.19178),
    (0.9, 16): (8.147, 0.93092, 1.75614),
    (0.95, 16): (11.198, 0.93940, 1.82152),
    (0.98, 64): (36.277, 0.98312, 3.12752),
}


@pytest.mark.parametrize(("tau", "cap"), TABLE)
def test_stopping_one_by_one_has_the_tabulated_values(tau: float, cap: int) -> None:
    draws, win, kl = TABLE[tau, cap]
    rule = ThresholdStopping(tau, cap)
    # 11.198 is printed where 11.197467 is right: by one unit of the last digit.
    assert rule.expected_draws == pytest.approx(11.197467 if (tau, cap) == (0.95, 16) else draws, abs=5.1e-4)
    assert rule.win_rate == pytest.approx(win, abs=5.1e-6)
    assert rule.kl == pytest.approx(kl, abs=5.1e-6)


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.9, 1 - 1e-9, 1.0])
@pytest.mark.parametrize("cap", [1, 2, 17])
def test_stopping_one_by_one_has_the_closed_forms(tau: float, cap: int) -> None:
    rule = ThresholdStopping(tau, cap)
    assert rule.expected_draws == pytest.approx(sum(tau**i for i in range(cap)), rel=1e-7)
    missed = tau**cap
    win = (1 - missed) * (1 + tau) / 2 + missed * tau * cap / (cap + 1)
    assert rule.win_rate == pytest.approx(win, abs=1e-9)
    kl = missed * (math.log(cap) + (cap - 1) * math.log(tau) - (cap - 1) / cap) if tau > 0 else 0.0
    if tau < 1:
        kl += (1 - missed) * math.log((1 - missed) / (1 - tau))
    assert rule.kl == pytest.approx(kl, abs=1e-7)


@pytest.mark.parametrize("wave", [1, 3, 8, 20])
def test_a_threshold_that_is_never_reached_is_best_of_the_cap(wave: int) -> None:
    rule = ThresholdStopping(1.0, 8, wave)
    assert rule.expected_draws == 8
    assert rule.expected_waves == math.ceil(8 / wave)
    assert rule.win_rate == pytest.approx(8 / 9)
    assert rule.kl == pytest.approx(math.log(8) - 7 / 8)


def test_a_threshold_of_0_stops_after_the_first_wave() -> None:
    rule = ThresholdStopping(0.0, 8, 3)
    assert (rule.expected_draws, rule.expected_waves) == (3, 1)
    assert rule.win_rate == pytest.approx(3 / 4)
    assert rule.kl == pytest.approx(math.log(3) - 2 / 3)
    # A first wave larger than the cap is cut to it.
    cut = ThresholdStopping(0.5, 3, 8)
    assert (cut.expected_draws, cut.expected_waves) == (3, 1)
    assert cut.win_rate == pytest.approx(3 / 4)
    assert cut.kl == pytest.approx(math.log(3) - 2 / 3)


def test_without_a_cap_the_known_forms_hold() -> None:
    for tau in (0.0, 0.5, 0.98):
        rule = ThresholdStopping(tau, None)
        assert rule.expected_draws == pytest.approx(1 / (1 - tau))
        assert rule.win_rate == pytest.approx((1 + tau) / 2)
        assert rule.kl == pytest.approx(-math.log(1 - tau), abs=1e-12)
        assert ThresholdStopping(tau, 5000).kl == pytest.approx(rule.kl, abs=1e-12)
        waves = ThresholdStopping(tau, None, 4)
        assert ThresholdStopping(tau, 5001, 4).win_rate == pytest.approx(waves.win_rate, abs=1e-12)
        assert waves.expected_draws == pytest.approx(4 / (1 - tau**4))


def simulate(rule: ThresholdStopping, runs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Kept value, draws and waves of each run; draws are made as a server makes them."""
    rng = np.random.default_rng(7)
    cap = rule.cap if rule.cap is not None else 400
    values = rng.random((runs, cap))
    ends = [*range(rule.wave, cap, rule.wave), cap]
    best = np.maximum.accumulate(values, axis=1)[:, [end - 1 for end in ends]]
    stops = best >= rule.threshold
    stops[:, -1] = True
    at = stops.argmax(axis=1)
    return best[np.arange(runs), at], np.array(ends)[at], at + 1


@pytest.mark.parametrize(
    ("tau", "cap", "wave"), [(0.9, 16, 4), (0.9, 14, 4), (0.6, 5, 2), (0.8, None, 3), (0.97, 3, 5)]
)
def test_waves_have_the_simulated_draws_win_rate_and_kl(tau: float, cap: int | None, wave: int) -> None:
    # 20,000 runs; bands of 4.5 standard errors, 5 rules with 4 quantities: one false alarm in 7,000 seeds, and the
    # seed is fixed.
    runs = 20_000
    rule = ThresholdStopping(tau, cap, wave)
    kept, draws, waves = simulate(rule, runs)

    def agrees(samples: np.ndarray, expected: float) -> bool:
        return abs(float(samples.mean()) - expected) <= 4.5 * float(samples.std()) / math.sqrt(runs) + 1e-12

    assert agrees(draws, rule.expected_draws)
    assert agrees(waves, rule.expected_waves)
    assert agrees(kept, rule.win_rate)
    # The CDF of what is kept, by hand: u^N below τ, and above it the sum over waves of τ^(drawn before)(u^w - τ^w).
    sizes = [wave] * (cap // wave) + [cap % wave] * (cap % wave > 0) if cap is not None else [wave] * 130

    def density(u: np.ndarray) -> np.ndarray:
        before, above = 0, np.zeros_like(u)
        for size in sizes:
            above += tau**before * size * u ** (size - 1)
            before += size
        return np.where(u < tau, before * u ** (before - 1), above)

    assert agrees(np.log(density(kept)), rule.kl)


def test_waves_cost_draws_and_save_time() -> None:
    one, four = ThresholdStopping(0.9, 16), ThresholdStopping(0.9, 16, 4)
    assert four.expected_draws > one.expected_draws
    assert four.expected_waves < one.expected_waves / 2
    assert four.win_rate > one.win_rate


def test_a_price_of_a_draw_gives_the_best_threshold() -> None:
    price = 0.02
    tau = threshold_for_price(price)
    assert tau == pytest.approx(0.8)
    rule = ThresholdStopping(tau, None)
    assert rule.win_rate - price * rule.expected_draws == pytest.approx(tau)


@pytest.mark.parametrize("price", [0.002, 0.02, 0.05])
@pytest.mark.parametrize("cap", [None, 4, 16])
@pytest.mark.parametrize("wave", [1, 2, 4])
def test_no_threshold_on_a_grid_has_a_larger_net_value_than_the_priced_one(
    price: float, cap: int | None, wave: int
) -> None:
    def net(tau: float) -> float:
        rule = ThresholdStopping(tau, cap, wave)
        return rule.win_rate - price * rule.expected_draws

    best = net(threshold_for_price(price, wave))
    assert max(net(tau) for tau in np.linspace(0, 0.999, 400).tolist()) <= best + 1e-12


def test_a_price_above_the_gain_of_another_wave_stops_at_once() -> None:
    assert threshold_for_price(0.5) == 0.0
    assert threshold_for_price(0.4, wave=8) == 0.0


@pytest.mark.parametrize("n", [2, 3, 8])
def test_the_win_rate_of_best_of_n_is_reached_with_half_of_the_draws_but_more_kl(n: int) -> None:
    tau = threshold_for_win_rate(n / (n + 1), None)
    assert tau == pytest.approx((n - 1) / (n + 1), abs=1e-12)
    rule = ThresholdStopping(tau, None)
    assert rule.expected_draws == pytest.approx((n + 1) / 2)
    if n == 8:
        # Printed: 4.5 draws, KL 1.504 against 1.204.
        assert rule.kl == pytest.approx(1.504, abs=5.1e-4)


@pytest.mark.parametrize(("cap", "wave"), [(9, 1), (16, 1), (16, 4), (13, 5), (None, 4)])
def test_a_threshold_reaches_the_win_rate_asked_for(cap: int | None, wave: int) -> None:
    tau = threshold_for_win_rate(8 / 9, cap, wave)
    assert 0 < tau < 1
    assert ThresholdStopping(tau, cap, wave).win_rate == pytest.approx(8 / 9, abs=1e-12)


def test_the_ends_of_the_reachable_win_rates() -> None:
    assert threshold_for_win_rate(8 / 9, 8) == 1.0
    assert threshold_for_win_rate(0.5, 8) == 0.0
    assert threshold_for_win_rate(4 / 5, 16, wave=4) == 0.0
    with pytest.raises(ValueError, match=r"out of reach: the cap allows 0\.8"):
        threshold_for_win_rate(8 / 9, 4)
    with pytest.raises(ValueError, match="out of reach"):
        threshold_for_win_rate(1.0, None)


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        ThresholdStopping(1.1, 4)
    with pytest.raises(ValueError, match="never stops"):
        ThresholdStopping(1.0, None)
    with pytest.raises(ValueError, match="at least one"):
        ThresholdStopping(0.5, 4, 0)
    with pytest.raises(ValueError, match="at least one"):
        ThresholdStopping(0.5, 0)
    with pytest.raises(ValueError, match="must be positive"):
        threshold_for_price(0.0)
    with pytest.raises(ValueError, match="at least one"):
        threshold_for_price(0.1, 0)
