import math

import numpy as np
import pytest

from trimtab_adapters.contract.best_of_n import best_of_n_kl_upper_bound
from trimtab_training.evaluation.procedures import STANDARD, Chosen
from trimtab_training.evaluation.selection_kl import selection_kl


@pytest.mark.parametrize(
    ("counts", "n", "expected"),
    [  # probabilities (.5, .5), (.7, .2, .1) and four times .25: the table of closed forms in InfAlign's notes, B.5
        ((2, 2), 2, 0.130812),
        ((5, 5), 4, 0.459356),
        ((14, 4, 2), 2, 0.097583),
        ((14, 4, 2), 4, 0.472531),
        ((14, 4, 2), 8, 1.079037),
        ((2, 2, 2, 2), 4, 0.590310),
    ],
)
def test_with_ties_it_is_the_closed_form_over_the_outcomes(counts: tuple[int, ...], n: int, expected: float) -> None:
    rewards = np.repeat(np.arange(float(len(counts))), counts)
    assert selection_kl(rewards, Chosen("best", n)) == pytest.approx(expected, abs=5e-7)  # printed to six digits
    assert selection_kl(-rewards, Chosen("worst", n)) == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize("n", [1, 2, 4, 8, 64])
def test_without_ties_it_is_the_bound(n: int) -> None:
    rewards = np.random.default_rng(0).permutation(32).astype(float)
    assert selection_kl(rewards, Chosen("best", n)) == pytest.approx(best_of_n_kl_upper_bound(n), abs=1e-12)


def test_one_sample_and_equal_rewards_move_nothing() -> None:
    assert selection_kl(np.array([1.0, 1.0, 2.0]), STANDARD) == pytest.approx(0.0, abs=1e-12)
    assert selection_kl(np.ones(8), Chosen("best", 8)) == pytest.approx(0.0, abs=1e-12)


def test_single_and_tied_rewards_together_are_the_sum_of_their_parts() -> None:
    """A continuous half below an atom of one half: the integral of 2u log 2u from 0 to ½, and ¾ log(¾ / ½)."""
    below = 0.25 * (math.log(2) + math.log(0.5) - 0.5)  # n u^n (log n / n ...) worked out: u^2 (log 2u - ½) at ½
    atom = 0.75 * math.log(0.75 / 0.5)
    rewards = np.array([1.0, 2.0, 3.0, 4.0, 9.0, 9.0, 9.0, 9.0])
    assert selection_kl(rewards, Chosen("best", 2)) == pytest.approx(below + atom, abs=1e-12)
