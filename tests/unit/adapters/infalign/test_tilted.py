"""Tilted policies on the calibrated scale: tables of the identity, the logarithm, exponentials; limits; quadrature."""

import math

import numpy as np
import pytest
from scipy.integrate import quad

from trimtab_adapters.infalign import closed_forms
from trimtab_adapters.infalign.procedures import Procedure
from trimtab_adapters.infalign.rank_policy import RankPolicy
from trimtab_adapters.infalign.rejection import acceptance_probability, expected_draws
from trimtab_adapters.infalign.tilted import TiltedPolicy
from trimtab_adapters.infalign.transforms import Exponential, Identity, Logarithm, OneStep, Transform
from trimtab_adapters.infalign.unit_interval import unit_grid

STANDARD = Procedure("standard")
BEST = [Procedure("best_of_n", n) for n in (2, 4, 8)]
WORST = [Procedure("worst_of_n", n) for n in (2, 4, 8)]

# Half a unit of the last printed digit, and a little for rounding at the tie.
SIX_DIGITS = 5.1e-7
FIVE_DIGITS = 5.1e-6

# λ: KL, win rate of one sample, best-of 2, 4, 8, worst-of 2, 4, 8.
IDENTITY = {
    0.5: (0.010352, 0.541494, 0.549067, 0.553893, 0.556633, 0.550440, 0.556632, 0.560386),
    1: (0.040652, 0.581977, 0.595417, 0.603559, 0.608010, 0.600718, 0.614065, 0.622340),
    2: (0.151596, 0.656518, 0.676378, 0.687183, 0.692677, 0.694927, 0.723024, 0.740691),
    5: (0.650117, 0.806784, 0.821881, 0.828419, 0.831426, 0.878254, 0.924273, 0.947804),
    10: (1.303085, 0.900045, 0.905008, 0.907139, 0.908137, 0.965108, 0.991470, 0.997888),
    20: (1.995732, 0.950000, 0.951250, 0.951829, 0.952108, 0.991250, 0.999449, 0.999988),
}

# n: KL, win rate of one sample and of best-of-N for all N, worst-of 2, 4, 8.
LOGARITHM = {
    2: (0.193147, 0.666667, 0.733333, 0.802020, 0.864498),
    3: (0.431946, 0.750000, 0.835714, 0.909241, 0.958993),
    4: (0.636294, 0.800000, 0.888889, 0.952987, 0.985649),
    8: (1.204442, 0.888889, 0.962092, 0.992979, 0.999412),
    16: (1.835089, 0.941176, 0.988711, 0.999263, 0.999989),
}

# (t, β): KL, win rate of one sample, best-of 2, 4, 8, worst-of 2, 4, 8; Φ mapped to [0, 1].
EXPONENTIAL: dict[tuple[float, float], tuple[float, ...]] = {
    (2, 1): (0.04333, 0.58209, 0.60585, 0.62397, 0.63552, 0.59054, 0.59380, 0.59476),
    (2, 0.2): (0.94679, 0.85240, 0.88103, 0.89230, 0.89695, 0.90435, 0.92798, 0.93665),
    (5, 1): (0.03889, 0.56935, 0.60111, 0.63136, 0.65408, 0.56642, 0.56232, 0.55963),
    (5, 0.5): (0.18776, 0.65234, 0.71070, 0.75693, 0.78452, 0.65099, 0.64394, 0.63850),
    (5, 0.2): (1.29334, 0.87792, 0.92330, 0.93787, 0.94240, 0.90288, 0.90451, 0.90103),
    (10, 1): (0.02802, 0.54810, 0.57882, 0.61565, 0.65009, 0.54005, 0.53519, 0.53293),
    (10, 0.5): (0.15329, 0.61486, 0.67954, 0.74582, 0.79451, 0.59928, 0.58820, 0.58274),
    (10, 0.2): (1.50276, 0.86608, 0.93718, 0.96068, 0.96577, 0.86316, 0.84901, 0.83888),
    (-5, 0.5): (0.07297, 0.59414, 0.58539, 0.57914, 0.57569, 0.64426, 0.70031, 0.75209),
    (-5, 0.1): (0.40147, 0.72584, 0.70686, 0.69511, 0.68864, 0.82719, 0.91842, 0.97426),
    (-10, 0.2): (0.11976, 0.59891, 0.57928, 0.56967, 0.56531, 0.66672, 0.75521, 0.84780),
    (-10, 0.05): (0.28650, 0.66591, 0.63721, 0.62227, 0.61515, 0.76605, 0.87608, 0.95867),
}


def rows(policy: TiltedPolicy) -> list[float]:
    return [policy.kl(), *(p.win_rate(policy.ranks) for p in [STANDARD, *BEST, *WORST])]


@pytest.mark.parametrize("lam", IDENTITY)
def test_the_tilt_by_the_identity_has_the_tabulated_values(lam: float) -> None:
    assert rows(TiltedPolicy(Identity(), 1 / lam)) == pytest.approx(IDENTITY[lam], abs=SIX_DIGITS)


@pytest.mark.parametrize("n", LOGARITHM)
def test_the_tilt_by_the_logarithm_has_the_tabulated_values(n: int) -> None:
    kl, win, *worst = LOGARITHM[n]
    assert rows(TiltedPolicy(Logarithm(), 1 / (n - 1))) == pytest.approx([kl, *[win] * 4, *worst], abs=SIX_DIGITS)


@pytest.mark.parametrize(("t", "beta"), EXPONENTIAL)
def test_the_tilt_by_an_exponential_has_the_tabulated_values(t: float, beta: float) -> None:
    assert rows(TiltedPolicy(Exponential(t), beta)) == pytest.approx(EXPONENTIAL[t, beta], abs=FIVE_DIGITS)


@pytest.mark.parametrize("lam", [1e-6, 9e-4, 1.1e-3, 0.5, 5, 20, 700, 1e5])
def test_the_closed_forms_of_the_identity_agree_with_quadrature(lam: float) -> None:
    policy = TiltedPolicy(Identity(), 1 / lam)
    # The KL of a λ below 1e-3 is λ²/24 with terms of λ⁴ left out; quadrature loses 1e-15 absolutely.
    assert closed_forms.identity_kl(lam) == pytest.approx(policy.kl(), rel=1e-9, abs=1e-13)
    assert closed_forms.identity_win_rate(lam) == pytest.approx(STANDARD.win_rate(policy.ranks), abs=2e-12)
    assert closed_forms.identity_log_partition(lam) == pytest.approx(policy.log_partition, abs=1e-9)
    u = np.array([0.0, 0.3, 1.0])
    assert policy.log_density(u) == pytest.approx(lam * u - closed_forms.identity_log_partition(lam), abs=1e-9)


@pytest.mark.parametrize("n", [1.25, 2, 4, 64])
def test_the_closed_forms_of_the_logarithm_agree_with_quadrature(n: float) -> None:
    policy = TiltedPolicy(Logarithm(), 1 / (n - 1))
    assert closed_forms.log_samples(1 / policy.beta) == pytest.approx(n)
    assert closed_forms.log_kl(n) == pytest.approx(policy.kl(), abs=1e-10)
    for procedure in (STANDARD, *BEST):
        assert closed_forms.log_win_rate(n) == pytest.approx(procedure.win_rate(policy.ranks), abs=1e-10)
    for procedure in (*WORST, Procedure("worst_of_n", 16)):
        # The alternating sum loses digits as N grows.
        assert closed_forms.log_worst_of(n, procedure.n) == pytest.approx(procedure.win_rate(policy.ranks), abs=1e-9)
    assert policy.density(np.array([0.5, 1.0])) == pytest.approx([n * 0.5 ** (n - 1), n])


@pytest.mark.parametrize(("t", "beta"), [*EXPONENTIAL, (0.1, 0.05), (-0.1, 0.05), (30, 0.003)])
def test_the_closed_forms_of_exponentials_agree_with_quadrature(t: float, beta: float) -> None:
    normalised = TiltedPolicy(Exponential(t), beta)
    plain = TiltedPolicy(Exponential(t, normalised=False), beta * abs(math.expm1(t)))
    lam = 1 / plain.beta
    # For small t the closed form takes differences of close numbers and keeps fewer digits.
    assert closed_forms.exponential_kl(t, lam) == pytest.approx(normalised.kl(), abs=1e-7)
    assert closed_forms.exponential_log_partition(t, lam) == pytest.approx(plain.log_partition, abs=1e-8)
    assert closed_forms.exponential_mean(t, lam) == pytest.approx(plain.mean_transform(), rel=1e-8)
    assert plain.kl() == pytest.approx(normalised.kl(), abs=1e-10)


def test_the_closed_form_of_an_exponential_says_where_it_ends() -> None:
    with pytest.raises(ValueError, match="too large"):
        closed_forms.exponential_kl(10, 1.0)
    assert math.isfinite(TiltedPolicy(Exponential(10, normalised=False), 1.0).kl())


@pytest.mark.parametrize(
    "transform",
    [Identity(), Logarithm(), Exponential(5), Exponential(-5), OneStep("best_of_n", 4), OneStep("worst_of_n", 4)],
)
@pytest.mark.parametrize("beta", [1e-7, 1e-3, 0.3, 1e3, 1e9])
def test_a_tilt_is_a_distribution_for_every_beta(transform: Transform, beta: float) -> None:
    policy = TiltedPolicy(transform, beta)
    assert unit_grid().integral(policy.ranks.density) == pytest.approx(1.0, abs=1e-12)
    assert np.all(np.isfinite(policy.ranks.log_density))
    assert np.all(np.diff(policy.ranks.cdf) >= 0)
    assert policy.kl() >= -1e-12
    # KL = E[Φ]/β - log Z by another path. For small β both terms are large: 1e7 leaves 9 digits.
    by_parts = policy.mean_transform() / beta - policy.log_partition
    assert policy.kl() == pytest.approx(by_parts, abs=1e-14 / beta + 1e-9)


def test_quadrature_agrees_with_an_adaptive_integrator() -> None:
    policy = TiltedPolicy(OneStep("worst_of_n", 3), 0.2)

    def weight(u: float) -> float:
        return math.exp((1 - (1 - u) ** 5) / 0.2)

    z = quad(weight, 0, 1, epsabs=0, epsrel=1e-12)[0]
    assert policy.log_partition == pytest.approx(math.log(z), abs=1e-11)
    at = 500
    below = quad(weight, 0, unit_grid().nodes[at], epsabs=0, epsrel=1e-12)[0] / z
    assert policy.ranks.cdf[at] == pytest.approx(below, abs=1e-11)


def test_running_integrals_are_exact_for_polynomials_and_end_at_the_integral() -> None:
    grid = unit_grid()
    assert grid.running_integral(grid.nodes**9) == pytest.approx(grid.nodes**10 / 10, abs=1e-15)
    assert grid.integral(grid.nodes**19) == pytest.approx(1 / 20, abs=1e-15)
    assert grid.nodes == pytest.approx(1 - grid.nodes[::-1], abs=1e-15)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
@pytest.mark.parametrize("transform", [Identity(), Exponential(10), OneStep("worst_of_n", 4)])
def test_worst_of_n_is_the_mirror_of_best_of_n(transform: Transform, n: int) -> None:
    policy = TiltedPolicy(transform, 0.3).ranks
    worst, best = Procedure("worst_of_n", n), Procedure("best_of_n", n)
    assert worst.win_rate(policy) == pytest.approx(1 - best.win_rate(policy.reflected()), abs=1e-12)
    assert policy.reflected().reflected().log_density == pytest.approx(policy.log_density)


@pytest.mark.parametrize("procedure", [STANDARD, *BEST, *WORST])
def test_the_reference_policy_wins_half_of_the_time(procedure: Procedure) -> None:
    assert procedure.win_rate(RankPolicy.reference()) == pytest.approx(0.5, abs=1e-12)
    assert RankPolicy.reference().kl() == pytest.approx(0.0, abs=1e-14)


def test_a_win_rate_counts_the_pairs_that_are_won() -> None:
    # 200,000 pairs; 4 standard errors of a share are below 4 * 0.5 / sqrt(200,000) = 0.0045: one false alarm in 16,000.
    rng = np.random.default_rng(1)
    n, pairs = 4, 200_000
    # The tilt by log u with β = 1 has density 2u: a draw is the square root of a uniform one.
    own, other = np.sqrt(rng.random((pairs, n))), rng.random((pairs, n))
    ranks = TiltedPolicy(Logarithm(), 1.0).ranks
    best = float(np.mean(own.max(axis=1) > other.max(axis=1)))
    worst = float(np.mean(own.min(axis=1) > other.min(axis=1)))
    assert Procedure("best_of_n", n).win_rate(ranks) == pytest.approx(best, abs=0.0045)
    assert Procedure("worst_of_n", n).win_rate(ranks) == pytest.approx(worst, abs=0.0045)


def test_a_policy_without_mass_somewhere_has_its_divergence() -> None:
    # Uniform on [½, 1]: KL log 2, win rate ¾. The grid has an edge at ½.
    policy = RankPolicy.from_density((unit_grid().nodes > 0.5).astype(np.float64))
    assert policy.kl() == pytest.approx(math.log(2), abs=1e-12)
    assert STANDARD.win_rate(policy) == pytest.approx(0.75, abs=1e-12)
    assert RankPolicy.reference().kl_to(RankPolicy.reference()) == 0.0
    assert RankPolicy.reference().kl_to(policy) == math.inf


def test_exact_rejection_accepts_the_best_always_and_needs_the_stated_draws() -> None:
    policy = TiltedPolicy(Identity(), 1 / 5)
    # λ / (1 - e^{-λ}) = 5.0339; printed 5.03.
    assert expected_draws(policy) == pytest.approx(5 / (1 - math.exp(-5)), rel=1e-10)
    assert expected_draws(policy) == pytest.approx(5.03, abs=5.1e-3)
    assert expected_draws(TiltedPolicy(Logarithm(), 1 / 7)) == pytest.approx(8, rel=1e-10)
    accepted = acceptance_probability(policy, np.array([0.0, 0.5, 1.0]))
    assert accepted == pytest.approx([math.exp(-5), math.exp(-2.5), 1.0])
    # A draw is accepted once in that many.
    everywhere = acceptance_probability(policy, unit_grid().nodes)
    assert unit_grid().integral(everywhere) == pytest.approx(1 / expected_draws(policy), rel=1e-12)


def test_impossible_arguments_are_refused() -> None:
    for beta in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="beta must be positive"):
            TiltedPolicy(Identity(), beta)
    with pytest.raises(ValueError, match="at least 1"):
        Procedure("best_of_n", 0)
    with pytest.raises(ValueError, match="one sample"):
        Procedure("standard", 2)
    for bad in (-math.inf, math.nan, math.inf):
        with pytest.raises(ValueError, match="weights of a policy"):
            RankPolicy.from_log_weights(np.full_like(unit_grid().nodes, bad))
