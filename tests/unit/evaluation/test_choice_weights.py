"""Every expected number is a count over all subsets, made here with itertools."""

from collections.abc import Iterator
from itertools import combinations, product

import numpy as np
import pytest

from trimtab_training.evaluation.choice_weights import choice_weights, disjoint_choice_weights, wins
from trimtab_training.evaluation.procedures import STANDARD, Chosen

POOLS = (
    [0.3, -1.0, 2.0, 0.7, 0.1],
    [1.0, 1.0, 0.0, 1.0, 0.0],
    [2.0, 2.0, 2.0, 2.0, 2.0],
)
CHOICES = [Chosen(extreme, n) for extreme in ("best", "worst") for n in (1, 2, 3, 4, 5)]


def pick(rewards: list[float], subset: tuple[int, ...], chosen: Chosen) -> list[int]:
    """All samples of a subset that tie for the choice."""
    extreme = max if chosen.extreme == "best" else min
    wanted = extreme(rewards[i] for i in subset)
    return [i for i in subset if rewards[i] == wanted]


@pytest.mark.parametrize("chosen", CHOICES, ids=lambda chosen: chosen.label)
@pytest.mark.parametrize("rewards", POOLS)
def test_weights_are_the_shares_of_all_subsets_with_ties_at_random(rewards: list[float], chosen: Chosen) -> None:
    expected = np.zeros(5)
    subsets = list(combinations(range(5), chosen.n))
    for subset in subsets:
        tied = pick(rewards, subset, chosen)
        expected[tied] += 1 / len(tied) / len(subsets)
    np.testing.assert_allclose(choice_weights(np.array(rewards), chosen), expected, atol=1e-12)


def test_best_of_all_samples_is_the_largest_alone() -> None:
    assert choice_weights(np.array([0.3, 2.0, 0.7]), Chosen("best", 3)).tolist() == [0.0, 1.0, 0.0]
    assert choice_weights(np.array([0.3, 2.0, 0.3]), Chosen("worst", 3)).tolist() == [0.5, 0.0, 0.5]


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="4 different samples are needed and there are 3"):
        choice_weights(np.array([1.0, 2.0, 3.0]), Chosen("best", 4))
    with pytest.raises(ValueError, match="4 different samples are needed and there are 3"):
        disjoint_choice_weights(np.zeros(3), Chosen("best", 3), np.zeros(3), STANDARD)
    with pytest.raises(ValueError, match="differ in size"):
        disjoint_choice_weights(np.zeros(3), STANDARD, np.zeros(4), STANDARD)


def disjoint_pairs(n1: int, n2: int, m: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for first in combinations(range(m), n1):
        for second in combinations(sorted(set(range(m)) - set(first)), n2):
            yield first, second


@pytest.mark.parametrize(
    ("first_chosen", "second_chosen"),
    [(a, b) for a, b in product(CHOICES, repeat=2) if a.n + b.n <= 5],
    ids=lambda chosen: chosen.label,
)
@pytest.mark.parametrize("second", [POOLS[0], [0.5, 0.3, -2.0, 0.9, 0.1], POOLS[1]])
@pytest.mark.parametrize("first", POOLS)
def test_disjoint_weights_give_the_win_rate_over_all_disjoint_pairs_of_subsets(
    first: list[float], second: list[float], first_chosen: Chosen, second_chosen: Chosen
) -> None:
    won = wins(np.array(first), np.array(second))
    pairs = list(disjoint_pairs(first_chosen.n, second_chosen.n, 5))
    expected = np.mean([won[pick(first, a, first_chosen)[0], pick(second, b, second_chosen)[0]] for a, b in pairs])
    weights = disjoint_choice_weights(np.array(first), first_chosen, np.array(second), second_chosen)
    assert weights.sum() == pytest.approx(1.0, abs=1e-9)
    assert not weights.diagonal().any()
    # Among ties `pick` takes another index than the code, which changes no win by these rewards.
    assert float((weights * won).sum()) == pytest.approx(float(expected), abs=1e-9)


def test_a_policy_against_itself_under_one_procedure_wins_exactly_half() -> None:
    rewards = np.random.default_rng(1).normal(size=9).round(1)
    for chosen in (STANDARD, Chosen("best", 4), Chosen("worst", 3)):
        weights = disjoint_choice_weights(rewards, chosen, rewards, chosen)
        assert float((weights * wins(rewards, rewards)).sum()) == pytest.approx(0.5, abs=1e-9)


def test_large_pools_do_not_overflow() -> None:
    """The largest of 513 different samples is in the part of 512 with odds 512/513, exactly."""
    rewards = np.random.default_rng(2).permutation(1024).astype(float)
    weights = disjoint_choice_weights(rewards, Chosen("best", 512), rewards, STANDARD)
    assert float((weights * wins(rewards, rewards)).sum()) == pytest.approx(512 / 513, abs=1e-9)
    assert choice_weights(rewards, Chosen("best", 512)).sum() == pytest.approx(1.0, abs=1e-12)
