"""Gold reward of best-of-n by a proxy, and the law that says where it turns."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab_adapters.infalign.overoptimization import OveroptimizationLaw, samples_at_kl
from trimtab_adapters.infalign.selection_curve import best_of_n_gold, selection_curve

pairs = st.lists(st.tuples(st.integers(0, 4), st.integers(-9, 9)), min_size=1, max_size=7)


def kl(n: int) -> float:
    return math.log(n) - (n - 1) / n


def exact_gains(alpha: float, beta: float, max_n: int) -> np.ndarray:
    return np.array([math.sqrt(kl(n)) * (alpha - beta * math.sqrt(kl(n))) for n in range(1, max_n + 1)])


@given(pairs)
def test_the_estimate_is_the_mean_over_all_subsets(pool: list[tuple[int, int]]) -> None:
    proxy, gold = [float(p) for p, _ in pool], [float(g) for _, g in pool]
    expected = []
    for n in range(1, len(pool) + 1):
        of_subsets = []
        for subset in combinations(range(len(pool)), n):
            top = max(proxy[i] for i in subset)
            tied = [gold[i] for i in subset if proxy[i] == top]
            of_subsets.append(sum(tied) / len(tied))
        expected.append(sum(of_subsets) / len(of_subsets))
    assert best_of_n_gold(proxy, gold) == pytest.approx(expected, abs=1e-9)


def test_the_estimate_is_the_same_in_every_order_of_the_pool() -> None:
    proxy, gold = [3.0, 1.0, 2.0, 2.0], [0.0, 5.0, 1.0, 3.0]
    # n = 1 the mean 9/4; n = 4 the best; n = 2: of six pairs three hold the 3, both 2s with the 1, and the pair of 2s.
    assert best_of_n_gold(proxy, gold) == pytest.approx([9 / 4, (3 * 0 + 1 + 3 + 2) / 6, (3 * 0 + 2) / 4, 0.0])
    assert best_of_n_gold(proxy[::-1], gold[::-1]) == pytest.approx(best_of_n_gold(proxy, gold))


def test_the_estimate_of_a_large_pool_keeps_its_digits() -> None:
    # Gold equal to the proxy, values 1 .. M: the mean maximum of n of M is n (M + 1) / (n + 1).
    size = 2000
    values = [float(i) for i in range(1, size + 1)]
    n = np.arange(1, size + 1)
    assert best_of_n_gold(values, values) == pytest.approx(n * (size + 1) / (n + 1), rel=1e-10)


def test_the_estimate_is_unbiased_for_fresh_samples() -> None:
    # Proxy u, gold u (1 - u): best-of-n has the mean n/(n+1) - n/(n+2). 2,000 pools of 8: the gold lies in [0, ¼], so
    # its standard error is below 0.125/sqrt(2000) = 0.0028 and 4.5 of them are 0.0126 at n = 8, less for small n.
    rng = np.random.default_rng(11)
    u = rng.random((2000, 8))
    mean = np.mean([best_of_n_gold(row, row * (1 - row)) for row in u], axis=0)
    n = np.arange(1, 9)
    assert mean == pytest.approx(n / (n + 1) - n / (n + 2), abs=0.0126)


def test_a_pool_that_cannot_be_ranked_is_refused() -> None:
    with pytest.raises(ValueError, match="one at least"):
        best_of_n_gold([], [])
    with pytest.raises(ValueError, match="as many gold"):
        best_of_n_gold([1.0], [])
    with pytest.raises(ValueError, match="not finite"):
        best_of_n_gold([math.nan], [1.0])
    with pytest.raises(ValueError, match="not finite"):
        best_of_n_gold([1.0], [math.inf])
    for max_n in (0, 3):
        with pytest.raises(ValueError, match="n lies between"):
            best_of_n_gold([1.0, 2.0], [1.0, 2.0], max_n)


def test_a_curve_averages_prompts_and_pairs_their_gains() -> None:
    curve = selection_curve(np.array([[1.0, 2.0], [3.0, 4.5], [5.0, 6.0]]))
    assert [point.n for point in curve] == [1, 2]
    assert [point.kl for point in curve] == pytest.approx([0.0, math.log(2) - 0.5])
    assert curve[1].gold == pytest.approx(12.5 / 3)
    # Gains 1, 1.5, 1: mean 7/6, sd sqrt(1/12), standard error 1/6.
    assert curve[1].gain == pytest.approx(7 / 6)
    assert curve[1].gain_standard_error == pytest.approx(1 / 6)
    # Gold of n = 1 is 1, 3, 5: sd 2, standard error 2/sqrt(3).
    assert curve[0].gold_high - curve[0].gold == pytest.approx(1.959964 * 2 / math.sqrt(3), abs=1e-5)
    assert curve[0].gold - curve[0].gold_low == pytest.approx(curve[0].gold_high - curve[0].gold)
    assert (curve[0].gain, curve[0].gain_standard_error) == (0.0, 0.0)
    with pytest.raises(ValueError, match="two prompts"):
        selection_curve(np.array([[1.0, 2.0]]))


def test_the_law_is_recovered_from_its_own_values() -> None:
    law = OveroptimizationLaw.fit(exact_gains(1.2, 0.5, 32))
    assert (law.alpha, law.beta) == pytest.approx((1.2, 0.5))
    assert (law.alpha_standard_error, law.beta_standard_error) == pytest.approx((0.0, 0.0), abs=1e-12)
    # d* = 1.2: KL 1.44, between n = 10 (1.403) and n = 11 (1.489).
    assert law.peak == pytest.approx(1.2)
    assert law.cap == 10
    assert law.gain(1.44) == pytest.approx(1.2 * (1.2 - 0.6))
    assert law.verdict == "cap"


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.3), (2.0, 1.0), (0.4, 1.0), (1.0, 20.0)])
def test_the_cap_is_the_whole_number_of_the_largest_gain(alpha: float, beta: float) -> None:
    gains = exact_gains(alpha, beta, 64)
    assert OveroptimizationLaw.fit(gains).cap == int(np.argmax(gains)) + 1


def test_gold_that_falls_from_the_start_caps_at_one() -> None:
    law = OveroptimizationLaw.fit(exact_gains(-0.5, 0.5, 16))
    assert (law.peak, law.cap, law.verdict) == (0.0, 1, "cap")
    # A straight fall, and one that slows down: no bend is needed, nor found.
    for beta in (0.0, -0.01):
        straight = OveroptimizationLaw.fit(exact_gains(-0.5, beta, 16))
        assert (straight.cap, straight.verdict) == (1, "cap")
    # Convex enough to be above 0 again at n = 16, where d = 1.355.
    assert OveroptimizationLaw.fit(exact_gains(-0.5, -0.4, 16)).cap is None


def test_no_cap_is_given_that_the_data_do_not_show() -> None:
    growing = OveroptimizationLaw.fit(exact_gains(1.0, -0.1, 16))
    assert (growing.peak, growing.cap, growing.verdict) == (None, None, "no significant bend")
    # d* = 2.5, at n of about 1,400.
    beyond = OveroptimizationLaw.fit(exact_gains(1.0, 0.2, 16))
    assert beyond.peak == pytest.approx(2.5)
    assert (beyond.cap, beyond.verdict) == (None, "beyond the data")
    unsure = OveroptimizationLaw(1.0, 0.5, 0.1, 0.5 / 1.9, 16)
    assert (unsure.cap, unsure.verdict) == (None, "no significant bend")
    assert OveroptimizationLaw(1.0, 0.5, 0.1, 0.5 / 2.0, 16).cap is not None


def test_known_errors_weigh_the_points_and_give_the_errors_of_the_fit() -> None:
    # 2,000 simulated fits with the noise that is stated; the sd of 2,000 has an error of 1.6 %: 8 % is 5 of them.
    errors = np.linspace(0.05, 0.3, 12)
    truth = exact_gains(1.0, 0.4, 12)
    rng = np.random.default_rng(2)
    fits = [OveroptimizationLaw.fit(truth + errors * rng.standard_normal(12), errors) for _ in range(2000)]
    alphas, betas = [f.alpha for f in fits], [f.beta for f in fits]
    assert fits[0].alpha_standard_error == pytest.approx(np.std(alphas), rel=0.08)
    assert fits[0].beta_standard_error == pytest.approx(np.std(betas), rel=0.08)
    assert np.mean(betas) == pytest.approx(0.4, abs=5 * float(np.std(betas)) / math.sqrt(2000))


def test_unknown_errors_are_estimated_from_the_scatter_around_the_law() -> None:
    # Seven points, five degrees of freedom: a single estimate of a variance has a relative error of sqrt(2/5), the mean
    # of 2,000 one of 1.4 %, their spread one of 3.2 %. 15 % is more than 4 of both together.
    truth = exact_gains(1.0, 0.4, 8)
    rng = np.random.default_rng(12)
    fits = [OveroptimizationLaw.fit(truth + 0.1 * rng.standard_normal(8)) for _ in range(2000)]
    for estimates, errors in (
        ([f.alpha for f in fits], [f.alpha_standard_error for f in fits]),
        ([f.beta for f in fits], [f.beta_standard_error for f in fits]),
    ):
        assert float(np.mean(np.square(errors))) == pytest.approx(float(np.var(estimates)), rel=0.15)


def prompt_curves(prompts: int, seed: int) -> np.ndarray:
    """Per-prompt estimates from pools of 16 where gold rises with the proxy and then falls: g = u - 2 u^8 + noise."""
    rng = np.random.default_rng(seed)
    u = rng.random((prompts, 16))
    gold = u - 2 * u**8 + 0.3 * rng.standard_normal((prompts, 16))
    return np.array([best_of_n_gold(p, g, 12) for p, g in zip(u, gold, strict=True)])


def test_resampled_errors_are_the_spread_over_fresh_prompts() -> None:
    # 200 fresh data sets; their sd has a standard error of 5 %, a bootstrap of 60 prompts one of about 10 %: 50 % is
    # more than 4.
    laws = [OveroptimizationLaw.fit_prompts(prompt_curves(60, seed), resamples=2) for seed in range(200)]
    law = OveroptimizationLaw.fit_prompts(prompt_curves(60, 999))
    assert law.beta_standard_error == pytest.approx(np.std([x.beta for x in laws]), rel=0.5)
    assert law.alpha_standard_error == pytest.approx(np.std([x.alpha for x in laws]), rel=0.5)


def test_a_fit_over_prompts_is_the_fit_to_their_mean_and_reproducible() -> None:
    curves = prompt_curves(40, 4)
    law = OveroptimizationLaw.fit_prompts(curves)
    plain = OveroptimizationLaw.fit((curves - curves[:, :1]).mean(axis=0))
    assert (law.alpha, law.beta) == pytest.approx((plain.alpha, plain.beta))
    assert law == OveroptimizationLaw.fit_prompts(curves)
    assert law.max_n == 12


def test_a_turning_gold_reward_is_found_with_enough_prompts() -> None:
    # E[g] of best-of-n is n/(n+1) - 2 n/(n+8): its largest value is at n = 1 or 2, by hand .2778 and .2667.
    law = OveroptimizationLaw.fit_prompts(prompt_curves(2000, 1))
    assert law.verdict == "cap"
    assert law.cap in (1, 2, 3)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 1000, 10**9])
def test_samples_at_a_kl_invert_the_kl_of_best_of_n(n: int) -> None:
    assert samples_at_kl(kl(n)) == pytest.approx(n, rel=1e-6)


def test_samples_at_extreme_values() -> None:
    # Near 1 the KL is (n-1)²/2.
    assert samples_at_kl(0.5e-14) == pytest.approx(1 + 1e-7, abs=1e-12)
    assert samples_at_kl(1e4) == math.inf
    with pytest.raises(ValueError, match="negative"):
        samples_at_kl(-0.1)


def test_too_little_data_is_refused() -> None:
    with pytest.raises(ValueError, match="n = 4"):
        OveroptimizationLaw.fit(np.zeros(3))
    with pytest.raises(ValueError, match="not positive"):
        OveroptimizationLaw.fit(np.zeros(4), np.array([0.0, 0.1, 0.0, 0.1]))
    with pytest.raises(ValueError, match="two at least"):
        OveroptimizationLaw.fit_prompts(np.zeros((1, 8)))
    with pytest.raises(ValueError, match="n = 4"):
        OveroptimizationLaw.fit_prompts(np.zeros((5, 3)))
