"""Win rates at equal KL, on numbers that can be counted by hand."""

import numpy as np
import pytest

from tasks.infalign import kl_weight
from tasks.infalign_figures import (
    Trained,
    at_kl,
    largest_common_kl,
    matched_differences,
    theory_at_kl,
    win_rates,
)
from trimtab_adapters.infalign.matched_kl import tilt_at_kl
from trimtab_adapters.infalign.procedures import Procedure, ProcedureKind
from trimtab_adapters.infalign.transforms import Identity
from trimtab_training.evaluation.procedures import Chosen

OWN = np.array([[1.0, 4.0, 6.0]])
BASE = np.array([[2.0, 3.0, 5.0]])


def test_the_best_of_all_samples_wins_or_loses() -> None:
    assert win_rates(Chosen("best", 3), OWN, OWN, BASE, BASE).tolist() == [1.0]  # 6 against 5
    assert win_rates(Chosen("worst", 3), OWN, OWN, BASE, BASE).tolist() == [0.0]  # 1 against 2


def test_the_best_of_two_is_averaged_over_all_pairs() -> None:
    """Own best: 4, 6, 6 of the three pairs; the base's: 3, 5, 5. 4 beats 3 alone, 6 beats all: (1/3 + 2) / 3."""
    assert win_rates(Chosen("best", 2), OWN, OWN, BASE, BASE)[0] == pytest.approx((1 / 3 + 2) / 3)


def test_what_decides_may_be_another_than_what_chooses() -> None:
    judge = np.array([[9.0, 0.0, 1.0]])  # the best by the reward, 6, is worth 1 to the judge
    assert win_rates(Chosen("best", 3), OWN, judge, BASE, np.array([[0.0, 0.0, 1.0]]))[0] == pytest.approx(0.5)


def test_between_policies_win_rates_are_linear_in_the_root_of_the_kl() -> None:
    points = [(0.16, 0.6), (0.64, 0.9)]
    assert at_kl(points, 0.04) == pytest.approx(0.55)  # half of the way from (0, 1/2) in the root
    assert at_kl(points, 0.36) == pytest.approx(0.75)
    assert at_kl(points, 0.64) == pytest.approx(0.9)


def test_transforms_are_compared_at_a_kl_that_all_have_reached() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(0.0, 0.05, 200)

    def policy(name: str, kl: float, rate: float) -> Trained:
        return Trained(name, np.full(200, kl), rate + noise)

    policies = [policy("optimal", 0.25, 0.7), policy("optimal", 1.0, 0.9), policy("raw", 0.25, 0.6)]
    assert largest_common_kl(policies) == pytest.approx(0.25)
    one, other, difference = matched_differences(policies, "optimal", "raw", 0.25, seed=0)
    shift = float(noise.mean())
    assert one.value == pytest.approx(0.7 + shift)
    assert other.value == pytest.approx(0.6 + shift)
    # Paired: the noise that both share is in neither end of the difference's interval.
    assert difference.low == pytest.approx(0.1)
    assert difference.high == pytest.approx(0.1)
    assert one.low < one.value < one.high


def test_theory_puts_the_optimum_above_the_tilt_by_the_calibrated_reward() -> None:
    kinds: tuple[ProcedureKind, ...] = ("best_of_n", "worst_of_n")
    for kind in kinds:
        found = theory_at_kl(kind, 4, 0.5)
        assert 0.5 < found["calibrated"] < found["optimal"] < 1.0


def test_a_weight_is_the_one_at_which_theory_expects_the_kl() -> None:
    procedure = Procedure("best_of_n", 4)
    weight = kl_weight("calibrated", procedure, 0.4, reward_sd=0.1)
    assert tilt_at_kl(Identity(), 0.4).beta == pytest.approx(weight)
    assert kl_weight("raw", procedure, 0.4, reward_sd=12**-0.5 / 2) == pytest.approx(weight / 2)
    assert kl_weight("optimal", procedure, 0.4, reward_sd=0.1) > 0
