"""Closed forms for imitating best-of-n and for combining independent rewards."""

import math

import numpy as np
import pytest

from trimtab_adapters.contract.best_of_n import best_of_n_distribution
from trimtab_adapters.infalign.combination import independent_minimum, independent_product
from trimtab_adapters.infalign.distillation import best_of_n_log_ratio, bonbon_beta


def test_the_weight_of_the_preference_loss_has_the_published_values() -> None:
    assert bonbon_beta(2) == 0.5
    assert bonbon_beta(4) == pytest.approx(0.0909091, abs=5.1e-8)
    assert bonbon_beta(8) == pytest.approx(0.0275482094, abs=5.1e-11)
    # Printed as .0100455; 1 / (30 H_15) with H_15 = 3.318228993...
    assert bonbon_beta(16) == pytest.approx(1 / (30 * sum(1 / i for i in range(1, 16))))
    assert bonbon_beta(16) == pytest.approx(0.0100455, abs=5.1e-8)


@pytest.mark.parametrize("n", [1, 2, 4, 32])
def test_the_log_ratio_of_best_of_n_is_that_of_its_distribution_and_its_binomial_sum(n: int) -> None:
    p = (0.7, 0.2, 0.1)
    q = best_of_n_distribution(p, n)
    for below, mass, chosen in zip((0.0, 0.7, 0.9), p, q, strict=True):
        assert best_of_n_log_ratio(below, mass, n) == pytest.approx(math.log(chosen / mass), abs=1e-12)
        terms = [math.comb(n, i) * below ** (n - i) * mass**i for i in range(1, n + 1)]
        assert best_of_n_log_ratio(below, mass, n) == pytest.approx(math.log(sum(terms) / mass), abs=1e-12)


def test_the_log_ratio_of_a_rare_outcome_keeps_its_digits() -> None:
    # p -> 0: q/p -> n F^{n-1}.
    assert best_of_n_log_ratio(0.5, 1e-14, 8) == pytest.approx(math.log(8) + 7 * math.log(0.5), abs=1e-12)


def test_an_independent_combination_is_calibrated() -> None:
    # 100,000 draws of m = 3; the distance of an empirical distribution exceeds sqrt(ln(2/1e-6)/(2 n)) = 0.0085 once in
    # a million seeds.
    draws = np.random.default_rng(5).random((100_000, 3))
    level = (np.arange(100_000) + 0.5) / 100_000
    minimum = np.sort([independent_minimum(s, 3) for s in draws.min(axis=1)])
    product = np.sort([independent_product(s, 3) for s in draws.prod(axis=1)])
    assert float(np.max(np.abs(minimum - level))) < 0.0085
    assert float(np.max(np.abs(product - level))) < 0.0085


def test_the_ends_of_a_combination() -> None:
    for combine in (independent_minimum, independent_product):
        assert combine(0.0, 3) == 0.0
        assert combine(1.0, 3) == 1.0
        assert combine(0.25, 1) == pytest.approx(0.25)
    assert independent_minimum(0.5, 2) == pytest.approx(0.75)
    assert independent_product(0.5, 2) == pytest.approx(0.5 * (1 + math.log(2)))


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        bonbon_beta(1)
    for below, mass, n in ((0.5, 0.0, 2), (-0.1, 0.5, 2), (0.6, 0.5, 2), (0.5, 0.5, 0)):
        with pytest.raises(ValueError, match="at most 1"):
            best_of_n_log_ratio(below, mass, n)
    with pytest.raises(ValueError, match="between 0 and 1"):
        independent_minimum(-0.1, 2)
    with pytest.raises(ValueError, match="at least 1"):
        independent_product(0.5, 0)
