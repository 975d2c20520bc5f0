"""Calibrated rewards and the closed forms of best-of-N."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab_adapters.contract.best_of_n import (
    best_of_n_distribution,
    best_of_n_kl_upper_bound,
    best_of_n_win_rate_upper_bound,
    kl_divergence,
    win_rate,
)
from trimtab_adapters.contract.calibration import EmpiricalCalibrator, leave_one_out, prompt_key

# Few values, so that ties are common; small integers, so that increasing maps stay exact.
tied_rewards = st.integers(-5, 5).map(float)
rewards = st.one_of(tied_rewards, st.floats(allow_nan=False, allow_infinity=False))


def fit(scores: list[float]) -> EmpiricalCalibrator:
    return EmpiricalCalibrator.fit(scores, reference="base", reward="r@1")


def test_a_tie_counts_half() -> None:
    calibrator = fit([3.0, 1.0, 2.0, 2.0])
    assert calibrator.calibrate(0.5) == 0.0
    assert calibrator.calibrate(1.0) == 0.5 / 4
    assert calibrator.calibrate(2.0) == (1 + 2 * 0.5) / 4
    assert calibrator.calibrate(2.5) == 3 / 4
    assert calibrator.calibrate(9.0) == 1.0


@given(st.lists(rewards, min_size=1, max_size=30), rewards)
def test_a_calibrated_reward_lies_between_0_and_1(scores: list[float], reward: float) -> None:
    assert 0.0 <= fit(scores).calibrate(reward) <= 1.0


@given(st.lists(rewards, min_size=1, max_size=30))
def test_the_mean_over_the_reference_rollouts_is_one_half(scores: list[float]) -> None:
    # Each pair (i, j), i = j included, adds 1 to the sum of i and j together: K^2 / 2 in all.
    calibrator = fit(scores)
    total = sum(round(2 * len(scores) * calibrator.calibrate(s)) for s in scores)
    assert total == len(scores) ** 2


@given(st.lists(rewards, min_size=2, max_size=30))
def test_the_mean_of_leave_one_out_is_one_half(scores: list[float]) -> None:
    total = sum(round(2 * (len(scores) - 1) * c) for c in leave_one_out(scores))
    assert total == len(scores) * (len(scores) - 1)


@given(st.lists(rewards, min_size=2, max_size=12))
def test_leave_one_out_is_the_calibrator_of_the_others(scores: list[float]) -> None:
    expected = [fit(scores[:i] + scores[i + 1 :]).calibrate(s) for i, s in enumerate(scores)]
    assert leave_one_out(scores) == expected


@given(st.lists(tied_rewards, min_size=1, max_size=20), tied_rewards)
def test_an_increasing_map_of_the_reward_changes_nothing(scores: list[float], reward: float) -> None:
    def increasing(r: float) -> float:
        return math.exp(r / 2) + r**3

    assert fit([increasing(s) for s in scores]).calibrate(increasing(reward)) == fit(scores).calibrate(reward)


@given(st.lists(rewards, min_size=1, max_size=20), rewards, rewards)
def test_a_larger_reward_is_never_calibrated_lower(scores: list[float], a: float, b: float) -> None:
    calibrator = fit(scores)
    assert calibrator.calibrate(min(a, b)) <= calibrator.calibrate(max(a, b))


def test_the_estimate_is_unbiased_with_ties() -> None:
    # Rewards 0, 1, 2 with probabilities .7, .2, .1: C(0) = .35, C(1) = .8, C(2) = .95. All 27 draws of K = 3.
    p = {0.0: 0.7, 1.0: 0.2, 2.0: 0.1}
    for reward, exact in [(0.0, 0.35), (1.0, 0.8), (2.0, 0.95)]:
        mean = sum(p[a] * p[b] * p[c] * fit([a, b, c]).calibrate(reward) for a, b, c in itertools.product(p, repeat=3))
        assert mean == pytest.approx(exact, abs=1e-12)


def test_the_standard_error_is_never_zero_and_largest_in_the_middle() -> None:
    calibrator = fit([float(i) for i in range(16)])
    assert calibrator.standard_error(0.5) == pytest.approx(0.125)
    # p = 0.5 / 17
    assert calibrator.standard_error(0.0) == pytest.approx(math.sqrt(0.5 / 17 * 16.5 / 17 / 16))


def test_extending_equals_fitting_all_at_once() -> None:
    assert fit([3.0, 1.0]).extend([2.0, 0.0]) == fit([0.0, 1.0, 2.0, 3.0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_refused_everywhere(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        fit([0.0, bad])
    with pytest.raises(ValueError, match="not finite"):
        fit([0.0]).calibrate(bad)
    with pytest.raises(ValueError, match="not finite"):
        leave_one_out([0.0, bad])
    with pytest.raises(ValueError, match="not finite"):
        fit([0.0]).extend([bad])


def test_too_few_rewards_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        fit([])
    with pytest.raises(ValueError, match="at least two"):
        leave_one_out([1.0])


def test_a_prompt_key_tells_token_ids_and_texts_apart() -> None:
    keys = [prompt_key([1, 23]), prompt_key([12, 3]), prompt_key([1, 2, 3]), prompt_key([1, 23], "a"), prompt_key([])]
    assert len(set(keys)) == len(keys)
    assert prompt_key([1, 23], "a") == prompt_key((1, 23), "a")
    assert len(prompt_key([1], "lone surrogate \ud800")) == 64


# Independent values of the same quantities, computed with 1e-6 precision from q_i = F_i^N - F_(i-1)^N.
@pytest.mark.parametrize(
    ("p", "n", "kl", "win"),
    [
        ((0.5, 0.5), 2, 0.130812, 0.625),
        ((0.5, 0.5), 4, 0.459356, 0.718750),
        ((0.7, 0.2, 0.1), 2, 0.097583, 0.608),
        ((0.7, 0.2, 0.1), 4, 0.472531, 0.743540),
        ((0.7, 0.2, 0.1), 8, 1.079037, 0.859488),
        ((0.25, 0.25, 0.25, 0.25), 4, 0.590310, 0.779297),
    ],
)
def test_best_of_n_with_ties_has_the_known_divergence_and_win_rate(
    p: tuple[float, ...], n: int, kl: float, win: float
) -> None:
    q = best_of_n_distribution(p, n)
    assert kl_divergence(q, p) == pytest.approx(kl, abs=5.1e-7)
    assert win_rate(q, p) == pytest.approx(win, abs=5.1e-7)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=8).filter(any), st.integers(1, 64))
def test_best_of_n_is_a_distribution_within_its_upper_bounds(weights: list[int], n: int) -> None:
    p = [w / sum(weights) for w in weights]
    q = best_of_n_distribution(p, n)
    assert all(0 <= x <= 1 for x in q)
    assert math.fsum(q) == pytest.approx(1.0, abs=1e-12)
    assert kl_divergence(q, p) <= best_of_n_kl_upper_bound(n) + 1e-12
    assert win_rate(q, p) <= best_of_n_win_rate_upper_bound(n) + 1e-12


def test_best_of_1_is_the_base() -> None:
    assert best_of_n_distribution((0.7, 0.2, 0.1), 1) == pytest.approx((0.7, 0.2, 0.1), abs=1e-15)
    assert best_of_n_kl_upper_bound(1) == 0.0
    assert best_of_n_win_rate_upper_bound(1) == 0.5


def test_best_of_n_reaches_its_bounds_without_ties() -> None:
    # 20,000 equally probable outcomes stand for a reward without ties; the error falls as n / outcomes.
    p = [1 / 20_000] * 20_000
    q = [((i + 1) / 20_000) ** 4 - (i / 20_000) ** 4 for i in range(20_000)]
    assert kl_divergence(q, p) == pytest.approx(best_of_n_kl_upper_bound(4), abs=1e-3)
    assert win_rate(q, p) == pytest.approx(best_of_n_win_rate_upper_bound(4), abs=1e-3)


def test_best_of_n_keeps_digits_where_powers_cancel() -> None:
    # The upper outcome has mass 1e-12: q = 1 - (1 - 1e-12)^3 = 3e-12 - 3e-24.
    assert best_of_n_distribution((1 - 1e-12, 1e-12), 3)[1] == pytest.approx(3e-12, rel=1e-9, abs=0)
    assert best_of_n_distribution((1e-300, 1.0), 2) == [0.0, 1.0]


def test_mass_outside_of_the_base_is_infinitely_far() -> None:
    assert kl_divergence([0.5, 0.5], [1.0, 0.0]) == math.inf


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        best_of_n_distribution((0.5, 0.5), 0)
    with pytest.raises(ValueError, match="at least 1"):
        best_of_n_kl_upper_bound(0)
    with pytest.raises(ValueError, match="negative"):
        best_of_n_distribution((1.5, -0.5), 2)
    with pytest.raises(ValueError, match="sum to 0"):
        best_of_n_distribution((0.0, 0.0), 2)
