"""Rows of the ablations: gains are paired over prompts."""

import numpy as np
import pytest

from tasks.ablations import gain_row
from tasks.outcomes import Outcomes


def outcomes(judge: list[list[float]], reward: list[list[float]]) -> Outcomes:
    ones = np.ones((len(judge), len(judge[0])))
    scores = {"judge": np.array(judge), "reward": np.array(reward)}
    return Outcomes(scores, ones, 0.5 * ones, 3.0 * ones, [[(1, 2, 3)] * len(judge[0])] * len(judge))


def test_a_gain_is_the_mean_of_differences_of_each_prompt() -> None:
    """Prompts differ by much more than policies do: unpaired, the interval would hold 0."""
    base = outcomes([[0.1, 0.3], [0.9, 0.7], [0.4, 0.6]], [[0.0, 0.0], [1.0, 1.0], [0.5, 0.5]])
    better = outcomes([[0.3, 0.3], [0.9, 0.9], [0.6, 0.6]], [[0.1, 0.1], [1.1, 1.1], [0.6, 0.6]])
    row = gain_row(better, base, seed=0)
    assert row["judge_gain"] == pytest.approx([0.1, 0.1, 0.1])
    assert row["reward_gain"] == pytest.approx([0.1, 0.1, 0.1])
    assert (row["kl"], row["tokens"]) == (0.5, 3.0)
