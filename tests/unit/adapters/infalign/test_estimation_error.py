"""Errors of a calibrated reward estimated from K rollouts: the three rows of the table and what they rest on."""

import math

import pytest

from trimtab_adapters.infalign.estimation_error import dkw_band, exponential_bias, max_standard_deviation, smoothed

SIZES = (4, 8, 16, 32, 64, 100, 256, 1000)


@pytest.mark.parametrize(
    ("k", "printed"), list(zip(SIZES, (0.250, 0.177, 0.125, 0.088, 0.0625, 0.050, 0.031, 0.016), strict=True))
)
def test_the_largest_standard_deviation_is_the_tabulated_one(k: int, printed: float) -> None:
    assert max_standard_deviation(k) == pytest.approx(printed, abs=5.1e-4)


@pytest.mark.parametrize(
    ("k", "printed"), list(zip(SIZES, (0.679, 0.480, 0.340, 0.240, 0.170, 0.136, 0.085, 0.043), strict=True))
)
def test_the_band_is_the_tabulated_one(k: int, printed: float) -> None:
    assert dkw_band(k) == pytest.approx(printed, abs=5.1e-4)


@pytest.mark.parametrize(
    ("k", "printed", "digit"),
    list(zip(SIZES, (12.7, 4.35, 2.16, 1.48, 1.22, 1.13, 1.05, 1.01), (0.1, *[0.01] * 7), strict=True)),
)
def test_the_bias_of_an_exponential_is_the_tabulated_one(k: int, printed: float, digit: float) -> None:
    assert exponential_bias(0.5, k, 10) == pytest.approx(printed, abs=0.51 * digit)


def test_the_bias_is_the_mean_over_the_binomial_distribution() -> None:
    # K Ĉ is Binomial(K, C) without ties.
    k, c, t = 6, 0.3, -4.0
    mean = sum(math.comb(k, i) * c**i * (1 - c) ** (k - i) * math.exp(t * i / k) for i in range(k + 1))
    assert exponential_bias(c, k, t) == pytest.approx(mean / math.exp(t * c), rel=1e-12)
    assert exponential_bias(0.0, k, t) == 1.0
    assert exponential_bias(1.0, k, t) == pytest.approx(1.0)


def test_smoothing_keeps_an_estimate_off_the_ends_and_in_order() -> None:
    assert smoothed(0.0, 4) == 0.1
    assert smoothed(1.0, 4) == 0.9
    assert smoothed(0.5, 4) == 0.5


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        smoothed(1.01, 4)
    with pytest.raises(ValueError, match="at least 1"):
        max_standard_deviation(0)
    with pytest.raises(ValueError, match="strictly between"):
        dkw_band(4, 1.0)
