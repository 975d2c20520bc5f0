"""Applying a pooled calibrator, and judging calibrated values."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab_adapters.contract.pooled_calibration import PooledCalibrator, calibrated_by_quantiles
from trimtab_adapters.contract.prompt_features import NUM_BUCKETS, PromptFeatures, hashed_words
from trimtab_adapters.contract.uniformity import coverage, ks_critical, ks_distance, randomised_rank

LEVELS = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
finite = st.floats(-1e6, 1e6)


def features() -> PromptFeatures:
    """Only the logarithm of the number of characters, as it is."""
    return PromptFeatures(np.zeros((0, NUM_BUCKETS)), np.zeros(3), np.array([1.0, 1e9, 1e9]))


def calibrator(slopes: list[list[float]], *, error: float = 0.1, num_prompts: int = 9) -> PooledCalibrator:
    return PooledCalibrator(
        features(), LEVELS, np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array(slopes), "base", "r@1", 90, num_prompts, error
    )


def by_quantiles(quantiles: list[float], reward: float) -> float:
    return float(calibrated_by_quantiles(np.array(quantiles), LEVELS, np.array([reward]))[0])


def test_between_two_quantiles_the_level_is_interpolated() -> None:
    assert by_quantiles([1, 2, 3, 4, 5], 2.0) == pytest.approx(0.3)
    assert by_quantiles([1, 2, 3, 4, 5], 2.25) == pytest.approx(0.35)
    assert by_quantiles([1, 2, 3, 4, 8], 7.0) == pytest.approx(0.7 + 0.2 * 3 / 4)


def test_a_tie_counts_half() -> None:
    # Half of the mass lies on 2: between the levels .3 and .7 all quantiles are 2, and the middle of them is .5.
    assert by_quantiles([1, 2, 2, 2, 5], 2.0) == pytest.approx(0.5)
    assert by_quantiles([0, 0, 0, 1, 2], 0.0) == pytest.approx(0.3)
    assert by_quantiles([0, 0, 0, 0, 0], 0.0) == pytest.approx(0.5)


def test_beyond_the_outermost_quantiles_half_of_their_mass_is_told() -> None:
    assert by_quantiles([1, 2, 3, 4, 5], -100.0) == pytest.approx(0.05)
    assert by_quantiles([1, 2, 3, 4, 5], 100.0) == pytest.approx(0.95)


@given(st.lists(finite, min_size=5, max_size=5), finite, finite)
def test_a_higher_reward_is_never_calibrated_lower(quantiles: list[float], one: float, other: float) -> None:
    low, high = (by_quantiles(sorted(quantiles), reward) for reward in sorted([one, other]))
    assert 0 < low <= high < 1


def test_the_prompt_shifts_the_quantiles() -> None:
    # The feature is log(1 + characters): log 4 for "abc". Each quantile rises by as much.
    shifted = calibrator([[1.0, 0.0, 0.0]] * 5)
    assert shifted.calibrate("abc", [3.0 + math.log(4)]) == pytest.approx([0.5])
    assert shifted.calibrate("abc", [3.0]) < [0.5]


def test_quantiles_that_cross_are_put_in_order() -> None:
    # At the feature log 4 = 1.386 the lowest line is at 1 + 5 · 1.386 = 7.93, above all others.
    crossing = calibrator([[5.0, 0.0, 0.0], *[[0.0, 0.0, 0.0]] * 4])
    assert crossing.quantiles(["abc"])[0] == pytest.approx([2.0, 3.0, 4.0, 5.0, 1 + 5 * math.log(4)])


def test_the_error_vanishes_at_the_ends_and_keeps_its_mean_square() -> None:
    pooled = calibrator([[0.0] * 3] * 5, error=0.2, num_prompts=10**9)
    grid = (np.arange(1000) + 0.5) / 1000
    mean_square = float(np.mean([pooled.standard_error(p) ** 2 for p in grid]))
    assert mean_square == pytest.approx(0.2**2, rel=1e-5)
    assert pooled.standard_error(0.0) < 0.001 < pooled.standard_error(0.5)
    assert calibrator([[0.0] * 3] * 5, num_prompts=9).standard_error(0.0) == pytest.approx(
        0.1 * math.sqrt(6 * 0.05 * 0.95)
    )


def test_it_survives_json_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    given = PooledCalibrator(
        PromptFeatures(rng.normal(size=(4, NUM_BUCKETS)), rng.normal(size=7), rng.random(7) + 0.1),
        LEVELS,
        rng.normal(size=5),
        rng.normal(size=(5, 7)),
        "base",
        "r@1",
        90,
        9,
        0.1,
    )
    read = PooledCalibrator.from_json(json.loads(json.dumps(given.to_json())))
    rewards = rng.normal(size=50).tolist()
    assert read.calibrate("some prompt?", rewards) == given.calibrate("some prompt?", rewards)
    assert read.to_json() == given.to_json()


def test_an_unknown_schema_is_refused() -> None:
    with pytest.raises(ValueError, match="schema version 2"):
        PooledCalibrator.from_json({**calibrator([[0.0] * 3] * 5).to_json(), "schema_version": 2})


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_refused(reward: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        calibrator([[0.0] * 3] * 5).calibrate("abc", [reward])


def test_features_are_the_same_in_every_process() -> None:
    # CRC-32 of "hello" is 0x3610A686: bucket 0x86 + 0x200 · k = 134 of 512 (0x686 mod 0x200 = 0x86), and the sign bit
    # is not set. One word alone has length 1.
    row = hashed_words(["Hello"])[0]
    assert np.flatnonzero(row).tolist() == [0x3610A686 % NUM_BUCKETS] == [134]
    assert row[134] == -1.0


def test_features_take_any_text_and_are_bounded() -> None:
    found = features().apply(["", "\ud800", "?" * 10**6])
    assert np.isfinite(found).all()
    assert np.abs(found).max() <= 4.0


def test_the_distance_from_uniform_is_that_of_the_definition() -> None:
    # Steps at .2 and .7: before .2 the function is 0, so .2 away; at .7 it is ½ below and 1 above: .2 and .3 away.
    assert ks_distance([0.7, 0.2]) == pytest.approx(0.3)
    assert ks_distance([0.5] * 10) == pytest.approx(0.5)
    assert ks_distance([0.8, 0.9]) == pytest.approx(0.8)  # just before the first step
    with pytest.raises(ValueError, match="no values"):
        ks_distance([])


def test_the_critical_value_is_kolmogorov_s() -> None:
    # Tables: 1.358 / sqrt(n) for large n; 0.409 for n = 10 (Miller 1956: .40925).
    assert ks_critical(10) == pytest.approx(0.40925, abs=1e-4)
    assert ks_critical(10_000) == pytest.approx(1.358 / 100, rel=5e-3)


def test_a_randomised_rank_is_uniform_whatever_the_ties() -> None:
    # Rank among K = 3 samples of a fair coin. Exact: average the distribution function at t over the 16 outcomes.
    def cdf(t: float) -> float:
        total = 0.0
        for outcome in np.ndindex(2, 2, 2, 2):
            mine, *others = outcome
            below, equal = sum(o < mine for o in others), sum(o == mine for o in others)
            low, high = (randomised_rank(below, equal, 3, u) for u in (0.0, 1.0))
            total += min(1.0, max(0.0, (t - low) / (high - low)))
        return total / 16

    for t in (0.1, 0.25, 0.4, 0.5, 0.9):
        assert cdf(t) == pytest.approx(t, abs=1e-12)


def test_coverage_counts_values_not_above_each_level() -> None:
    assert coverage([0.1, 0.2, 0.2, 0.9], [0.15, 0.2, 1.0]) == [(0.15, 0.25), (0.2, 0.75), (1.0, 1.0)]
