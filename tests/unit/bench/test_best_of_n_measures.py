"""The arithmetic of the benches of best-of-N: estimators, matching at equal reward, and the simulation."""

import math

import numpy as np
import pytest

from harness.counting_proxy import Call
from harness.order_statistics import binned_kl, expected_shares, jackknife, max_weights, rank_histogram
from harness.peer_measures import PROBE, Tally, honoured
from harness.peers import PeerAnswer
from harness.sample_pool import RewardPool
from harness.selection_simulation import Simulation
from harness.strategy_costs import Costs, match, matched_ratio


def test_the_largest_of_two_of_three_is_the_middle_one_in_a_third_of_the_draws() -> None:
    # Of the pairs {1,2}, {1,3}, {2,3} one has its maximum at 2 and two have it at 3.
    assert max_weights(3, 2) == pytest.approx([0, 1 / 3, 2 / 3])


def test_weights_of_one_draw_are_equal_and_of_all_draws_are_on_the_largest() -> None:
    assert max_weights(4, 1) == pytest.approx([0.25] * 4)
    assert max_weights(4, 4) == pytest.approx([0, 0, 0, 1])


def test_the_jackknife_of_a_mean_is_the_mean_with_its_usual_standard_error() -> None:
    estimate = jackknife(np.array([1.0, 2.0, 6.0]), float)
    # Mean 3; sample variance (4 + 1 + 9) / 2 = 7.
    assert estimate.value == pytest.approx(3)
    assert estimate.error == pytest.approx(math.sqrt(7 / 3))


def test_the_jackknife_takes_the_bias_of_a_square_off() -> None:
    # The mean's square exceeds the square of the expectation by the variance of the mean, 7 / 3 here.
    assert jackknife(np.array([1.0, 2.0, 6.0]), lambda mean: float(mean) ** 2).value == pytest.approx(9 - 7 / 3)


def test_ranks_fill_equal_bins() -> None:
    assert rank_histogram(np.array([0.0, 1.0, 2.5, 3.0]), 3, 2) == pytest.approx([0.5, 0.5])
    with pytest.raises(ValueError, match="equal bins"):
        rank_histogram(np.array([0.0]), 4, 2)


def test_ranks_of_the_best_of_n_have_the_shares_of_a_power_of_the_uniform() -> None:
    # Without held-out noise the share of the upper half is 1 - 2^-n; a thousand held-out samples come close.
    assert expected_shares(1, 1, 2) == pytest.approx([0.5, 0.5])
    assert expected_shares(999, 3, 2)[1] == pytest.approx(1 - 2**-3, abs=2e-3)
    # One held-out sample: the best of n is above it with probability n / (n + 1).
    assert expected_shares(1, 3, 2) == pytest.approx([0.25, 0.75])


def test_binned_kl_counts_empty_bins_as_nothing() -> None:
    assert binned_kl(np.array([0.0, 1.0])) == pytest.approx(math.log(2))


def costs(calibrated: float, tokens: float, num_prompts: int = 4) -> Costs:
    full = np.full(num_prompts, 1.0)
    return Costs(calibrated=full * calibrated, reward=full, probability=full, tokens=full * tokens)


def test_tokens_are_interpolated_where_the_sweep_reaches_the_same_reward() -> None:
    sweep = [costs(0.8, 200), costs(0.9, 400)]
    found = match(costs(0.825, 500), [0.6, 0.7], sweep, np.arange(4))
    assert found is not None
    assert found.setting == pytest.approx(0.625)
    assert found.token_ratio == pytest.approx(250 / 500)


def test_a_sweep_that_does_not_reach_the_reward_gives_no_ratio() -> None:
    assert matched_ratio(costs(0.95, 500), [0.6, 0.7], [costs(0.8, 200), costs(0.9, 400)]) is None


@pytest.fixture
def pool() -> RewardPool:
    """Two prompts of 400 samples of ten tokens; the partial reward after four is the final one."""
    rewards = np.random.default_rng(0).standard_normal((2, 400))
    return RewardPool(["a", "b"], rewards, np.full((2, 400), 10), {4: rewards})


def test_a_simulated_best_of_n_has_the_win_rate_of_theory_and_all_tokens(pool: RewardPool) -> None:
    played = Simulation(pool, num_plays=4000).best_of(8)
    # 8 / 9 up to 1 / 400 of discreteness and four standard errors of 0.1 / sqrt(8000): a false alarm in 16,000.
    assert played.calibrated.mean() == pytest.approx(8 / 9, abs=0.0025 + 4 * 0.1 / math.sqrt(8000))
    assert played.tokens == pytest.approx([80, 80])


def test_a_simulated_adaptive_draw_stops_at_the_threshold(pool: RewardPool) -> None:
    played = Simulation(pool, num_plays=4000).adaptive(0.5, [1] * 20, 0)
    # Geometric with probability one half: two draws of ten tokens on average, with a standard deviation of sqrt(2)
    # draws. What is chosen is uniform above the threshold.
    assert played.tokens.mean() == pytest.approx(20, abs=4 * 10 * math.sqrt(2) / math.sqrt(8000))
    assert played.calibrated.mean() == pytest.approx(0.75, abs=0.0025 + 4 * 0.145 / math.sqrt(8000))


def test_a_simulated_early_rejection_by_the_final_reward_loses_nothing(pool: RewardPool) -> None:
    simulation = Simulation(pool)
    played = simulation.early_reject(8, 0.5, [4])
    assert played.calibrated == pytest.approx(simulation.best_of(8).calibrated)
    assert played.tokens == pytest.approx([8 * 4 + 4 * 6] * 2)  # eight to the checkpoint, four from there on


def call(body: dict[str, object], prompt_tokens: int = 5, completion_tokens: int = 10) -> Call:
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return Call("/v1/chat/completions", {"messages": [{"content": "x"}], **body}, {"usage": usage}, 200)


def test_parameters_are_honoured_when_every_candidate_has_them() -> None:
    answer = PeerAnswer("x", 5, 20, has_logprobs=True, wall_s=1.0)
    calls = [call({**PROBE, "seed": 7}), call({**PROBE, "seed": 8})]
    assert honoured(answer, calls, 2) == list(PROBE)
    assert "temperature" not in honoured(answer, [*calls, call({**PROBE, "temperature": 1})], 2)
    assert "seed" not in honoured(answer, [call({**PROBE, "seed": 9})], 2)


def test_a_judge_is_not_asked_to_honour_parameters() -> None:
    answer = PeerAnswer("x", 5, 20, has_logprobs=True, wall_s=1.0)
    judge = call({"messages": [{"content": "x"}, {"content": "rate it"}]})
    assert honoured(answer, [call(dict(PROBE)), judge], 1) == list(PROBE)


def test_usage_is_right_when_it_counts_what_the_engine_generated() -> None:
    tally = Tally()
    tally.add(PeerAnswer("x", 5, 20, has_logprobs=False, wall_s=1.0), [call({}), call({})])
    tally.add(PeerAnswer("x", 0, 10, has_logprobs=False, wall_s=3.0), [call({}), call({})])
    assert tally.figures() == {
        "median_s": 2.0,
        "upstream_calls": 2,
        "completion_tokens_right": 0.5,
        "prompt_tokens_right": 0.5,
    }
