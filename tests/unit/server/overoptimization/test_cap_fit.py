"""From scored pools to a cap."""

import numpy as np
import pytest

from trimtab_adapters.contract.errors import ConflictError
from trimtab_adapters.contract.selection_cap import SelectionCap
from trimtab_adapters.infalign.overoptimization import OveroptimizationLaw
from trimtab_adapters.infalign.selection_curve import best_of_n_gold
from trimtab_server.overoptimization.cap_fit import MAX_N, ScoredPool, choose_max_n, fit_selection_cap


def fit(pools: list[ScoredPool], max_n: int) -> SelectionCap:
    return fit_selection_cap(pools, max_n, proxy="p@1", gold="g@2", base_model="base", created_at=7.0, route="nice")


def turning_pools(prompts: int, samples: int, noise: float = 0.1, seed: int = 0) -> list[ScoredPool]:
    """Gold rises with the proxy to its 60th percentile and falls steeply behind."""
    rng = np.random.default_rng(seed)
    pools = []
    for prompt in range(prompts):
        u = rng.random(samples)
        g = u - 1.5 * np.maximum(0, u - 0.6) / 0.4 + noise * rng.standard_normal(samples)
        pools.append(ScoredPool(str(prompt), u.tolist(), g.tolist()))
    return pools


def test_gold_that_turns_gets_a_cap_near_its_best_n() -> None:
    cap = fit(turning_pools(400, 16), 12)
    # E[g] of the best of n is n/(n+1) - 3.75 E[max(0, u - .6)]; its law has a cap near the n where that is largest.
    n = np.arange(1, 13)
    lost = 3.75 * (n / (n + 1) * (1 - 0.6 ** (n + 1)) - 0.6 * (1 - 0.6**n))
    exact = n / (n + 1) - lost
    for point, expected in zip(cap.curve, exact, strict=True):
        assert abs(point.gold - expected) < 2 * (point.gold_high - point.gold_low)  # 4 standard errors either way: 6e-5
    assert cap.verdict == "cap"
    assert cap.cap is not None
    assert abs(cap.cap - (int(np.argmax(exact)) + 1)) <= 1
    assert (cap.num_prompts, cap.num_samples) == (400, 6400)
    assert (cap.proxy, cap.gold, cap.base_model, cap.route, cap.created_at) == ("p@1", "g@2", "base", "nice", 7.0)


def test_a_proxy_that_is_the_gold_reward_gets_no_cap_within_the_data() -> None:
    pools = [ScoredPool(pool.prompt_key, pool.proxy, pool.proxy) for pool in turning_pools(100, 16)]
    cap = fit(pools, 12)
    assert cap.cap is None
    assert cap.verdict != "cap"
    assert all(a.gold < b.gold for a, b in zip(cap.curve, cap.curve[1:], strict=False))


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
    twice = [*pools, *pools]
    once, again = fit(pools, 6), fit(twice, 6)
    assert again.num_prompts == 30
    assert (again.alpha, again.beta) == pytest.approx((once.alpha, once.beta))
    assert again.beta_standard_error == pytest.approx(once.beta_standard_error)
    assert again.num_samples == 2 * once.num_samples


def test_the_law_is_fitted_to_the_mean_over_prompts() -> None:
    pools = turning_pools(25, 9)
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
