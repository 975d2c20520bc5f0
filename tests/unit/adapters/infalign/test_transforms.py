"""Transforms of a calibrated reward."""

import math

import numpy as np
import pytest

from trimtab_adapters.infalign.transforms import (
    Exponential,
    Identity,
    Logarithm,
    OneStep,
    Tabulated,
    Transform,
    build_transform,
)

U = np.linspace(0, 1, 101)


@pytest.mark.parametrize(
    "transform",
    [
        Identity(),
        Logarithm(),
        Exponential(5),
        Exponential(-5),
        Exponential(10, normalised=False),
        Exponential(-10, normalised=False),
        OneStep("best_of_n", 4),
        OneStep("worst_of_n", 4),
        Tabulated((0.0, 0.3, 1.0), (0.0, 0.1, 2.0)),
    ],
)
def test_every_transform_increases(transform: Transform) -> None:
    values = transform(U)
    assert values.shape == U.shape
    assert np.all(np.diff(values) > 0)


@pytest.mark.parametrize("t", [-500.0, -10.0, -0.5, 1e-9, 0.5, 10.0, 500.0])
def test_a_normalised_exponential_goes_from_0_to_1_and_is_affine_in_the_plain_one(t: float) -> None:
    values = Exponential(t)(U)
    assert values[0] == 0.0
    assert values[-1] == pytest.approx(1.0, abs=1e-12)
    if abs(t) <= 10:
        # (Φ - Φ(0)) / (Φ(1) - Φ(0)) for Φ = sign(t) e^{tu}; for t = 1e-9 this way has 7 digits only, and Φ is u.
        plain = Exponential(t, normalised=False)(U)
        expected = (plain - plain[0]) / (plain[-1] - plain[0]) if abs(t) > 1e-6 else U
        assert values == pytest.approx(expected, abs=1e-8)


def test_the_plain_exponential_has_the_sign_of_its_exponent() -> None:
    assert Exponential(2, normalised=False)(np.array([0.5]))[0] == pytest.approx(math.e)
    assert Exponential(-2, normalised=False)(np.array([0.5]))[0] == pytest.approx(-1 / math.e)


def test_one_step_transforms_are_the_powers_and_their_mirror() -> None:
    assert OneStep("best_of_n", 3)(np.array([0.5]))[0] == 0.5**5
    assert OneStep("worst_of_n", 3)(np.array([0.5]))[0] == 1 - 0.5**5
    assert OneStep("best_of_n", 3)(U) == pytest.approx(1 - OneStep("worst_of_n", 3)(1 - U))
    assert OneStep("best_of_n", 1)(U) == pytest.approx(U)


def test_the_logarithm_of_0_is_minus_infinity_without_a_warning() -> None:
    assert Logarithm()(np.array([0.0, 1.0])).tolist() == [-math.inf, 0.0]


def test_a_tabulated_transform_passes_through_its_points() -> None:
    table = Tabulated((0.0, 0.25, 1.0), (0.0, 1.0, 1.0))
    assert table(np.array([0.0, 0.25, 0.6, 1.0])) == pytest.approx([0.0, 1.0, 1.0, 1.0])
    # Between 65 points a square is met to less than half of the (1/64)² / 4 by which straight lines miss it.
    points = np.linspace(0, 1, 65)
    square = Tabulated(tuple(points.tolist()), tuple((points**2).tolist()))
    assert square(U) == pytest.approx(U**2, abs=0.4 * (1 / 64) ** 2 / 4)


@pytest.mark.parametrize(
    ("u", "values"),
    [
        ((0.0,), (0.0,)),
        ((0.0, 1.0), (0.0, 1.0, 2.0)),
        ((0.0, 0.9), (0.0, 1.0)),
        ((0.1, 1.0), (0.0, 1.0)),
        ((0.0, 0.5, 0.5, 1.0), (0.0, 1.0, 1.0, 2.0)),
        ((0.0, 0.5, 1.0), (0.0, 1.0, 0.5)),
        ((0.0, 1.0), (0.0, math.nan)),
        ((0.0, 1.0), (0.0, math.inf)),
    ],
)
def test_a_table_that_is_no_increasing_function_on_the_interval_is_refused(
    u: tuple[float, ...], values: tuple[float, ...]
) -> None:
    with pytest.raises(ValueError, match="tabulated transform"):
        Tabulated(u, values)


def test_plain_values_name_a_transform() -> None:
    assert build_transform("identity") == Identity()
    assert build_transform("log") == Logarithm()
    assert build_transform("exponential", t=-7.5) == Exponential(-7.5, normalised=True)
    assert build_transform("best_of_n", n=4) == OneStep("best_of_n", 4)
    assert build_transform("worst_of_n", n=4) == OneStep("worst_of_n", 4)


@pytest.mark.parametrize(
    ("kind", "t", "n", "says"),
    [
        ("cubic", None, None, "unknown transform 'cubic'"),
        ("exponential", None, None, "t belongs"),
        ("identity", 1.0, None, "t belongs"),
        ("best_of_n", None, None, "n belongs"),
        ("log", None, 4, "n belongs"),
        ("exponential", 1.0, 4, "n belongs"),
        ("exponential", 0.0, None, "other than 0"),
        ("exponential", math.nan, None, "other than 0"),
        ("exponential", 501.0, None, "other than 0"),
        ("worst_of_n", None, 0, "at least 1"),
    ],
)
def test_plain_values_that_name_no_transform_are_refused(kind: str, t: float | None, n: int | None, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build_transform(kind, t=t, n=n)
