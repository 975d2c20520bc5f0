"""Soft best-of-n and best-of-Poisson."""

import math

import numpy as np
import pytest

from trimtab_adapters.infalign.matched_kl import tilt_at_kl
from trimtab_adapters.infalign.poisson import BestOfPoisson
from trimtab_adapters.infalign.procedures import Procedure
from trimtab_adapters.infalign.soft import soft_best_of_n
from trimtab_adapters.infalign.tilted import TiltedPolicy
from trimtab_adapters.infalign.transforms import Exponential, Identity, Logarithm, Transform
from trimtab_adapters.infalign.unit_interval import unit_grid

STANDARD = Procedure("standard")
TARGET = TiltedPolicy(Identity(), 1 / 5)

# n: win rate, KL(soft || tilt), for the identity and λ = 5.
EXACT = {
    2: (0.6290, 0.3457),
    4: (0.7201, 0.0992),
    8: (0.7687, 0.0227),
    16: (0.7899, 0.0049),
    32: (0.7989, 0.0011),
    64: (0.8030, 0.0003),
}
# The printed ones come from a simulation and are right to about three digits: .6288 .7199 .7685 .7900 .7990 .8031 and
# .346 .0997 .0231 .0049 .0011 .0003.
PRINTED = {
    2: (0.6288, 0.346),
    4: (0.7199, 0.0997),
    8: (0.7685, 0.0231),
    16: (0.7900, 0.0049),
    32: (0.7990, 0.0011),
    64: (0.8031, 0.0003),
}


@pytest.mark.parametrize("n", EXACT)
def test_soft_best_of_n_has_the_exact_values_and_about_the_printed_ones(n: int) -> None:
    soft = soft_best_of_n(TARGET, n)
    found = (STANDARD.win_rate(soft), soft.kl_to(TARGET.ranks))
    assert found == pytest.approx(EXACT[n], abs=5.1e-5)
    assert found == pytest.approx(PRINTED[n], abs=6e-4)


def test_a_soft_choice_between_two_is_the_integral_over_pairs() -> None:
    # f(u) = 2 ∫ w(u) / (w(u) + w(v)) dv; for a = e^{λu}, ∫ a / (a + e^{λv}) dv = 1 - (1/λ) log((a + e^λ) / (a + 1)).
    lam, u = 5.0, unit_grid().nodes
    a = np.exp(lam * u)
    density = 2 * (1 - np.log((a + math.exp(lam)) / (a + 1)) / lam)
    assert soft_best_of_n(TARGET, 2).density == pytest.approx(density, abs=1e-9)


def test_a_soft_choice_among_four_is_the_simulated_one() -> None:
    # 200,000 choices; 4.5 standard errors of a mean of values in [0, 1] are below 4.5 * 0.29 / sqrt(200,000) = 0.003:
    # one false alarm in 150,000.
    rng = np.random.default_rng(3)
    values = rng.random((200_000, 4))
    weights = np.cumsum(np.exp(5 * values), axis=1)
    chosen = (rng.random((200_000, 1)) * weights[:, -1:] > weights).sum(axis=1)
    mean = float(values[np.arange(200_000), chosen].mean())
    assert STANDARD.win_rate(soft_best_of_n(TARGET, 4)) == pytest.approx(mean, abs=0.003)


@pytest.mark.parametrize("transform", [Identity(), Logarithm(), Exponential(10), Exponential(-10)])
@pytest.mark.parametrize("beta", [0.01, 0.2, 5.0])
def test_a_soft_choice_among_one_is_the_reference_policy(transform: Transform, beta: float) -> None:
    # For the smallest β the exponents range over hundreds; the trapezoid rule keeps 10 digits.
    assert soft_best_of_n(TiltedPolicy(transform, beta), 1).kl() == pytest.approx(0.0, abs=1e-9)


def test_an_almost_hard_soft_choice_is_almost_best_of_n() -> None:
    # Two of four samples are closer than δ with probability 12 δ at most, and then the choice costs about δ: 12 β².
    soft = soft_best_of_n(TiltedPolicy(Identity(), 0.01), 4)
    assert 0 < 4 / 5 - STANDARD.win_rate(soft) < 12 * 0.01**2


def test_the_rule_of_thumb_keeps_the_loss_below_two_hundredths_of_a_strong_tilt() -> None:
    # For λ = 2 it does not quite: the loss is .0222 there.
    for lam in (5.0, 10.0, 20.0):
        target = TiltedPolicy(Identity(), 1 / lam)
        n = math.ceil(3 * lam / (1 - math.exp(-lam)))
        loss = STANDARD.win_rate(target.ranks) - STANDARD.win_rate(soft_best_of_n(target, n))
        assert 0 < loss < 0.02


def test_the_distance_to_the_tilt_falls_as_the_square_of_1_over_n_for_large_n() -> None:
    # KL is quadratic in the difference of the densities, which is of order 1/n.
    near = [soft_best_of_n(TARGET, n).kl_to(TARGET.ranks) * n**2 for n in (64, 128, 256)]
    assert near[2] == pytest.approx(near[1], rel=0.1)


def test_best_of_poisson_has_the_printed_values() -> None:
    for mu, win, kl, tilted in ((3, 0.77225, 0.49457, 0.77241), (7, 0.87753, 1.10046, 0.87756)):
        policy = BestOfPoisson(mu)
        assert policy.win_rate == pytest.approx(win, abs=5.1e-6)
        assert policy.kl() == pytest.approx(kl, abs=5.1e-6)
        assert STANDARD.win_rate(tilt_at_kl(Identity(), policy.kl()).ranks) == pytest.approx(tilted, abs=5.1e-6)


@pytest.mark.parametrize("mu", [0.0, 1e-5, 9e-4, 0.5, 3.0, 50.0])
def test_best_of_poisson_is_the_mixture_over_n(mu: float) -> None:
    u = np.linspace(0, 1, 21)
    # Poisson(50) beyond 150 has less than 1e-27.
    chances = [math.exp(-mu)]
    for k in range(1, 150):
        chances.append(chances[-1] * mu / k)
    policy = BestOfPoisson(mu)
    assert policy.cdf(u) == pytest.approx(sum(p * u ** (k + 1) for k, p in enumerate(chances)), abs=1e-12)
    assert policy.density(u) == pytest.approx(sum(p * (k + 1) * u**k for k, p in enumerate(chances)), abs=1e-10)
    assert policy.win_rate == pytest.approx(sum(p * (k + 1) / (k + 2) for k, p in enumerate(chances)), abs=1e-11)
    assert STANDARD.win_rate(policy.ranks) == pytest.approx(policy.win_rate, abs=1e-11)
    assert policy.ranks.cdf == pytest.approx(policy.cdf(unit_grid().nodes), abs=1e-11)


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        soft_best_of_n(TARGET, 0)
    with pytest.raises(ValueError, match="negative"):
        BestOfPoisson(-0.1)
