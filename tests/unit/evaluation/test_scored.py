"""Policies over three outcomes, of which every possible pool of samples is gone through: expectations are exact."""

from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest

from trimtab_adapters.contract.best_of_n import best_of_n_distribution, win_rate
from trimtab_training.evaluation.draws import Draws
from trimtab_training.evaluation.procedures import STANDARD, Chosen
from trimtab_training.evaluation.scored import Floats, Outcome, Scored, calibrated_histogram, win_rates

REWARDS = np.array([0.0, 1.0, 1.0])
"""Of the three outcomes, of which two tie."""
JUDGED = np.array([2.0, 0.0, 1.0])
BASE = np.array([0.5, 0.3, 0.2])
STEERED = np.array([0.2, 0.2, 0.6])


def outcome_of(pools: Sequence[Sequence[int]], chosen: Chosen) -> Outcome:
    """A policy whose samples, one pool per prompt, are these outcomes."""
    index = np.array(pools)
    return Outcome("", chosen, Scored(Draws(()), {"r": REWARDS[index], "judge": JUDGED[index]}), "r")


def distribution(p: Floats, chosen: Chosen) -> Floats:
    """Of the choice over the three outcomes: best-of-n over the two rewards, among ties in proportion."""
    classes = best_of_n_distribution([p[0], p[1] + p[2]], chosen.n)
    if chosen.extreme == "worst":
        classes = best_of_n_distribution([p[1] + p[2], p[0]], chosen.n)[::-1]
    return np.array([classes[0], *(classes[1] * p[1:] / p[1:].sum())])


def exact(p: Floats, q: Floats, scores: Floats) -> float:
    order = np.argsort(scores)
    groups = [[i for i in order if scores[i] == value] for value in np.unique(scores)]
    return win_rate([p[g].sum() for g in groups], [q[g].sum() for g in groups])


PAIRS = [
    (STANDARD, STANDARD),
    (Chosen("best", 2), Chosen("best", 2)),
    (Chosen("best", 3), Chosen("best", 3)),
    (Chosen("worst", 2), Chosen("worst", 2)),
    (Chosen("best", 3), STANDARD),
    (Chosen("worst", 3), Chosen("best", 2)),
]


@pytest.mark.parametrize(("first_chosen", "second_chosen"), PAIRS)
@pytest.mark.parametrize("by", ["r", "judge"])
def test_the_win_rate_of_two_policies_is_unbiased(first_chosen: Chosen, second_chosen: Chosen, by: str) -> None:
    """27 pools of three samples on either side, each pair of them a prompt that counts by its probability."""
    pools = list(product(range(3), repeat=3))
    first, second = zip(*product(pools, repeat=2), strict=True)
    rates = win_rates(outcome_of(first, first_chosen), outcome_of(second, second_chosen), by, is_disjoint=False)
    weights = STEERED[np.array(first)].prod(axis=1) * BASE[np.array(second)].prod(axis=1)
    scores = {"r": REWARDS, "judge": JUDGED}[by]
    expected = exact(distribution(STEERED, first_chosen), distribution(BASE, second_chosen), scores)
    assert weights.sum() == pytest.approx(1.0)
    assert rates @ weights == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("first_chosen", "second_chosen"),
    [(STANDARD, STANDARD), (Chosen("best", 3), STANDARD), (Chosen("worst", 2), Chosen("best", 2))],
)
@pytest.mark.parametrize("by", ["r", "judge"])
def test_the_win_rate_of_a_policy_over_itself_is_unbiased(first_chosen: Chosen, second_chosen: Chosen, by: str) -> None:
    """81 pools of four samples that both sides choose from."""
    pools = list(product(range(3), repeat=4))
    rates = win_rates(outcome_of(pools, first_chosen), outcome_of(pools, second_chosen), by, is_disjoint=True)
    weights = BASE[np.array(pools)].prod(axis=1)
    scores = {"r": REWARDS, "judge": JUDGED}[by]
    expected = exact(distribution(BASE, first_chosen), distribution(BASE, second_chosen), scores)
    assert rates @ weights == pytest.approx(expected, abs=1e-9)


def test_with_samples_in_common_a_policy_over_itself_would_be_biased() -> None:
    """Three rewards, so that wins are no sums, in which dependence would cancel."""
    rewards, p = np.array([0.0, 1.0, 2.0]), np.array([0.2, 0.3, 0.5])
    pools = np.array(list(product(range(3), repeat=4)))
    scored = Scored(Draws(()), {"r": rewards[pools]})
    best, worst = (Outcome("", Chosen(extreme, 2), scored, "r") for extreme in ("best", "worst"))
    of_best = best_of_n_distribution(p.tolist(), 2)
    of_worst = best_of_n_distribution(p[::-1].tolist(), 2)[::-1]
    expected = win_rate(of_best, of_worst)
    weights = p[pools].prod(axis=1)
    assert win_rates(best, worst, "r", is_disjoint=True) @ weights == pytest.approx(expected, abs=1e-9)
    assert win_rates(best, worst, "r", is_disjoint=False) @ weights - expected > 1e-3


def test_two_outcomes_by_hand() -> None:
    """Base (½, ½), steered (¼, ¾) on rewards 0 and 1.

    One sample: ¾·½ + ½·(¾·½ + ¼·½) = .625. Best of two: steered 15/16 on 1, base ¾; 15/16·¼ + ½·(15/16·¾ + 1/16·¼).
    """
    rewards = np.array([0.0, 1.0])
    pools = list(product(range(2), repeat=2))
    first, second = (np.array(side) for side in zip(*product(pools, repeat=2), strict=True))
    weights = np.array([0.25, 0.75])[first].prod(axis=1) * 0.25
    for chosen, expected in ((STANDARD, 0.625), (Chosen("best", 2), 15 / 64 + (45 / 64 + 1 / 64) / 2)):
        one, other = (Outcome("", chosen, Scored(Draws(()), {"r": rewards[i]}), "r") for i in (first, second))
        assert win_rates(one, other, "r", is_disjoint=False) @ weights == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("chosen", [STANDARD, Chosen("best", 2), Chosen("worst", 3)])
def test_means_under_a_choice_are_unbiased(chosen: Chosen) -> None:
    pools = list(product(range(3), repeat=3))
    values = np.array([5.0, -1.0, 3.0])
    means = outcome_of(pools, chosen).mean(values[np.array(pools)])
    weights = BASE[np.array(pools)].prod(axis=1)
    assert means @ weights == pytest.approx(distribution(BASE, chosen) @ values, abs=1e-12)


def test_the_reference_policy_fills_its_own_histogram_evenly() -> None:
    """Samples that rank 0 .. 9 among ten: by leave-one-out each spreads over its own tenth."""
    ranks = np.random.default_rng(0).permutation(10).astype(float)[None]
    assert calibrated_histogram(ranks, ranks, is_disjoint=True, num_bins=10) == pytest.approx([0.1] * 10)
    ties = np.zeros((1, 10))
    assert calibrated_histogram(ties, ties, is_disjoint=True, num_bins=10) == pytest.approx([0.1] * 10)
    best = calibrated_histogram(np.full((1, 4), 9.5), ranks, is_disjoint=False, num_bins=11)
    assert best == pytest.approx([0.0] * 10 + [1.0])
