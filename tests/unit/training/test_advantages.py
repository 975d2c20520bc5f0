import numpy as np
import pytest

from trimtab_training.objectives.advantages import generalised_advantages, normalised, token_rewards


def test_each_token_pays_for_its_log_ratio_and_the_last_one_earns_the_reward() -> None:
    # log-ratios 1, 0, -1 at 0.1 a nat
    rewards = token_rewards(2.0, (-1.0, -2.0, -1.5), (-2.0, -2.0, -0.5), kl_coef=0.1)
    assert rewards == pytest.approx([-0.1, 0.0, 2.1])


def test_advantages_are_discounted_sums_of_errors_of_the_values() -> None:
    rewards, values = np.array([0.0, 0.0, 1.0]), np.array([0.5, 0.4, 0.2])
    # errors with gamma 0.5: 0.5 * 0.4 - 0.5 = -0.3, 0.5 * 0.2 - 0.4 = -0.3, 1 - 0.2 = 0.8; with lambda 0.5 each adds a
    # quarter of the advantage behind it: -0.3 - 0.025, -0.3 + 0.2, 0.8
    got = generalised_advantages(rewards, values, gamma=0.5, gae_lambda=0.5)
    assert got == pytest.approx([-0.325, -0.1, 0.8])


def test_lambda_0_looks_one_token_ahead_and_1_to_the_end() -> None:
    rewards, values = np.array([0.0, 0.0, 1.0]), np.array([0.5, 0.4, 0.2])
    one = generalised_advantages(rewards, values, gamma=0.5, gae_lambda=0.0)
    assert one == pytest.approx([-0.3, -0.3, 0.8])
    # discounted rewards to come: 0.25, 0.5, 1
    whole = generalised_advantages(rewards, values, gamma=0.5, gae_lambda=1.0)
    assert whole == pytest.approx([0.25 - 0.5, 0.5 - 0.4, 1.0 - 0.2])


def test_the_values_of_a_perfect_value_model_leave_no_advantage() -> None:
    # rewards 1, 2, 3 and gamma 0.5: 3, then 2 + 1.5, then 1 + 1.75
    got = generalised_advantages(np.array([1.0, 2.0, 3.0]), np.array([2.75, 3.5, 3.0]), gamma=0.5, gae_lambda=0.7)
    assert got == pytest.approx([0.0, 0.0, 0.0])


def test_advantages_are_normalised_over_all_tokens_and_not_row_by_row() -> None:
    rows = normalised([np.array([1.0, 3.0]), np.array([5.0])])
    # mean 3, variance (4 + 0 + 4) / 3
    assert rows[0] == pytest.approx([-2 / (8 / 3) ** 0.5, 0.0])
    assert rows[1] == pytest.approx([2 / (8 / 3) ** 0.5])


def test_equal_advantages_become_zero_and_no_rows_stay_none() -> None:
    assert [row.tolist() for row in normalised([np.array([4.0, 4.0]), np.array([4.0])])] == [[0.0, 0.0], [0.0]]
    assert normalised([]) == []
