"""From scored pools to a cap."""

import numpy as np
import pytest

from trimtab_adapters.contract.errors import ConflictError
from trimtab_adapters.contract.selection_cap import SelectionCap
from trimtab_adapters.infalign.overoptimization import OveroptimizationLaw
from trimtab_adapters.infalign.selection_curve import best_of_n_gold
from trimtab_server.overoptimization.cap_fit import MAX_N, ScoredPool, choose_max_n, fit_selection_cap


def fit(pools: list[ScoredPool], max_n: int) -> SelectionCap:
    return fit_selection_cap(
        pools,
        max_n,
        proxy="p@1",
        gold="g@2",
        base_model="base",
        created_at=7.0,
        num_rollouts=99,
        left_out={"of temperature 0": 3},
        route="nice",
    )


def turning_pools(prompts: int, samples: int, seed: int = 0) -> list[ScoredPool]:
    """Gold u - u^16 and noise for a proxy u: it rises up to u = 0.83 and falls steeply behind."""
    rng = np.random.default_rng(seed)
    pools = []
    for prompt in range(prompts):
        u = rng.random(samples)
        gold = u - u**16 + 0.1 * rng.standard_normal(samples)
        pools.append(ScoredPool(str(prompt), u.tolist(), gold.tolist()))
    return pools


def test_gold_that_turns_gets_a_cap_near_its_best_n() -> None:
    cap = fit(turning_pools(400, 24), 16)
    # E[g] of the best of n is n/(n+1) - n/(n+16): by hand .441 .556 .592 .600 .595 .. .441, largest at n = 4.
    n = np.arange(1, 17)
    for point, expected in zip(cap.curve, n / (n + 1) - n / (n + 16), strict=True):
        # The whole width of an interval is 3.9 standard errors: 1e-4 a point, 1.6e-3 for all 16, and the seed is fixed.
        assert abs(point.gold - expected) < point.gold_high - point.gold_low
    assert cap.verdict == "cap"
    # The law is not that curve: fitted to it without noise up to n = 16 it has its peak at n = 3.2.
    assert cap.cap in (3, 4)
    assert (cap.num_prompts, cap.num_samples) == (400, 9600)
    assert (cap.num_rollouts, cap.left_out) == (99, {"of temperature 0": 3})
    assert (cap.proxy, cap.gold, cap.base_model, cap.route, cap.created_at) == ("p@1", "g@2", "base", "nice", 7.0)


def test_gold_that_levels_off_gets_no_cap_though_its_law_peaks() -> None:
    # Gold is 1 for any proxy above 0.5 and u twice below: nearly all is reached with 4 candidates, and nothing is lost.
    rng = np.random.default_rng(2)
    pools = []
    for prompt in range(200):
        u = rng.random(32)
        gold = np.minimum(1.0, 2 * u) + 0.01 * rng.standard_normal(32)
        pools.append(ScoredPool(str(prompt), u.tolist(), gold.tolist()))
    law = OveroptimizationLaw.fit_prompts(np.array([best_of_n_gold(p.proxy, p.gold, 32) for p in pools]))
    assert law.cap is not None
    cap = fit(pools, 32)
    assert (cap.cap, cap.verdict) == (None, "no significant fall")


def test_a_proxy_that_is_the_gold_reward_gets_no_cap_within_the_data() -> None:
    pools = [ScoredPool(pool.prompt_key, pool.proxy, pool.proxy) for pool in turning_pools(100, 16)]
    cap = fit(pools, 12)
    assert cap.cap is None
    assert cap.verdict != "cap"
    assert all(a.gold < b.gold for a, b in zip(cap.curve, cap.curve[1:], strict=False))


def test_gold_that_only_falls_gets_a_cap_of_1() -> None:
    # Gold is minus the proxy: -n/(n+1), a fall that slows down.
    rng = np.random.default_rng(8)
    pools = [ScoredPool(str(i), (u := rng.random(8)).tolist(), (-u).tolist()) for i in range(50)]
    cap = fit(pools, 8)
    assert (cap.cap, cap.verdict) == (1, "cap")
    assert cap.beta < 0


def test_noise_alone_gets_no_cap() -> None:
    # One-sided 2.5 % a data set: more than 4 caps of 20 have a chance of 1.5e-4 (binomial).
    rng = np.random.default_rng(3)
    caps = 0
    for _ in range(20):
        pools = [ScoredPool(str(i), rng.random(8).tolist(), rng.random(8).tolist()) for i in range(60)]
        caps += fit(pools, 8).cap is not None
    assert caps <= 4


def test_pools_of_one_prompt_count_as_one_prompt() -> None:
    pools = turning_pools(30, 8)
    twice = [*pools, *(ScoredPool(p.prompt_key, p.proxy, p.gold) for p in pools)]
    once, again = fit(pools, 6), fit(twice, 6)
    assert again.num_prompts == 30
    assert (again.alpha, again.beta) == pytest.approx((once.alpha, once.beta))
    assert again.beta_standard_error == pytest.approx(once.beta_standard_error)
    assert again.num_samples == 2 * once.num_samples


def test_the_law_is_fitted_to_the_mean_over_prompts() -> None:
    pools = turning_pools(200, 9)
    law = OveroptimizationLaw.fit_prompts(np.array([best_of_n_gold(p.proxy, p.gold, 7) for p in pools]))
    cap = fit(pools, 7)
    assert (cap.alpha, cap.beta, cap.beta_standard_error) == (law.alpha, law.beta, law.beta_standard_error)
    assert (cap.cap, cap.verdict) == (law.cap, law.verdict)
    assert len(cap.curve) == 7


def test_the_largest_n_is_reached_by_half_of_the_useful_prompts() -> None:
    assert choose_max_n([8] * 20) == 8
    assert choose_max_n([16] * 30 + [8] * 30) == 16
    assert choose_max_n([16] * 29 + [8] * 31) == 8
    # Prompts with fewer than four samples are no use and do not count.
    assert choose_max_n([16] * 30 + [3] * 100) == 16
    # At least 20 prompts reach it, though 15 are half.
    assert choose_max_n([16] * 15 + [8] * 15) == 8
    assert choose_max_n([1000] * 20) == MAX_N


def test_too_few_prompts_are_refused_with_what_is_missing() -> None:
    with pytest.raises(ConflictError, match="takes 20 prompts with 4 samples of one policy each, and the log has 19"):
        choose_max_n([8] * 19 + [3] * 50)
