"""Several rewards calibrated as one."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab_adapters.contract.calibration import EmpiricalCalibrator
from trimtab_adapters.contract.joint_calibration import JointCalibrator, joint_leave_one_out
from trimtab_adapters.contract.rewards import Combine

# Each example takes some milliseconds, more on a busy machine.
quick = settings(deadline=None, max_examples=50)
COMBINES: tuple[Combine, ...] = ("mean", "min", "product")
# Few values, so that ties are common.
tied = st.integers(-3, 3).map(float)
rows_of_two = st.lists(st.tuples(tied, tied), min_size=2, max_size=12)


def joint(rows: Sequence[Sequence[float]], combine: Combine) -> JointCalibrator:
    m = len(rows[0])
    return JointCalibrator(tuple(tuple(row) for row in rows), combine, (1 / m,) * m)


@quick
@given(st.lists(tied, min_size=1, max_size=12), tied, st.sampled_from(COMBINES))
def test_one_reward_is_calibrated_as_by_itself(scores: list[float], reward: float, combine: Combine) -> None:
    alone = EmpiricalCalibrator.fit(scores, reference="base", reward="r@1")
    together = joint([[score] for score in scores], combine)
    assert together.calibrate([reward]) == pytest.approx(alone.calibrate(reward), abs=1e-12)
    assert together.combined([reward]) == pytest.approx(
        (len(scores) * alone.calibrate(reward) + 0.5) / (len(scores) + 1), abs=1e-12
    )


@quick
@given(rows_of_two, st.sampled_from(COMBINES))
def test_the_mean_under_the_reference_policy_is_one_half(rows: list[tuple[float, float]], combine: Combine) -> None:
    # A new sample and the K rollouts are exchangeable: each of the K + 1 is as likely to be the new one. So the mean
    # over who it is must be ½ for every sample of K + 1, whatever the ties and however the two rewards hang together.
    values = [joint(rows[:i] + rows[i + 1 :], combine).calibrate(row) for i, row in enumerate(rows)]
    assert sum(values) / len(values) == pytest.approx(0.5, abs=1e-12)


@quick
@given(rows_of_two, st.tuples(tied, tied), st.sampled_from(COMBINES))
def test_increasing_maps_of_any_reward_change_nothing(
    rows: list[tuple[float, float]], candidate: tuple[float, float], combine: Combine
) -> None:
    def mapped(row: tuple[float, float]) -> tuple[float, float]:
        return row[0] ** 3 + 7, math.exp(row[1])

    before, after = joint(rows, combine), joint([mapped(row) for row in rows], combine)
    assert after.calibrate(mapped(candidate)) == before.calibrate(candidate)
    assert after.combined(mapped(candidate)) == before.combined(candidate)
    assert after.standard_error(mapped(candidate)) == before.standard_error(candidate)


@quick
@given(rows_of_two, st.tuples(tied, tied), st.tuples(tied, tied), st.sampled_from(COMBINES))
def test_a_candidate_that_is_nowhere_lower_is_not_calibrated_lower(
    rows: list[tuple[float, float]], one: tuple[float, float], other: tuple[float, float], combine: Combine
) -> None:
    higher = (max(one[0], other[0]), max(one[1], other[1]))
    calibrator = joint(rows, combine)
    assert calibrator.calibrate(higher) >= calibrator.calibrate(one)
    assert calibrator.combined(higher) >= calibrator.combined(one)


def closed_form(combine: Combine, combined: float, m: int) -> float:
    if combine == "min":
        return 1 - (1 - combined) ** m
    return combined * sum((-math.log(combined)) ** k / math.factorial(k) for k in range(m))


@pytest.mark.parametrize(("combine", "m"), list(itertools.product(("min", "product"), (2, 3))))
def test_independent_rewards_have_the_closed_form_of_their_combination(combine: Combine, m: int) -> None:
    # K = 4000: the values have a standard error below sqrt(0.25 / 4000) * 1.5 = 0.012 (the half more for the ranks of
    # each reward), so 5 standard errors are 0.06: a false alarm in 1 of 10^6 runs for each of the 36 comparisons. The
    # generator is seeded, so that a run that passes always passes.
    rng = np.random.default_rng(7)
    calibrator = joint(rng.random((4000, m)).tolist(), combine)
    for candidate in rng.random((9, m)):
        true = float(candidate.min() if combine == "min" else candidate.prod())
        assert calibrator.calibrate(candidate.tolist()) == pytest.approx(closed_form(combine, true, m), abs=0.06)


@pytest.mark.parametrize("combine", COMBINES)
def test_the_standard_error_is_that_of_repeated_draws(combine: Combine) -> None:
    # 300 draws of K = 16 rollouts give the true error within 300^-0.5 / sqrt(2) = 4 %; the mean of 40 bootstraps
    # scatters by less than 10 % around its own mean. The plain sqrt(p (1 - p) / K) is 15 to 35 % too small here.
    rng = np.random.default_rng(3)
    candidate = [0.6, 0.5, 0.7]
    drawn = [joint(rng.random((16, 3)).tolist(), combine) for _ in range(300)]
    spread = float(np.std([calibrator.calibrate(candidate) for calibrator in drawn]))
    told = float(np.mean([calibrator.standard_error(candidate) for calibrator in drawn[:40]]))
    assert told == pytest.approx(spread, rel=0.2)
    p = float(np.mean([calibrator.calibrate(candidate) for calibrator in drawn]))
    assert spread > 1.1 * math.sqrt(p * (1 - p) / 16)


def test_the_error_of_a_candidate_beyond_all_rollouts_is_not_told_as_0() -> None:
    calibrator = joint([[0.0, 0.0]] * 8, "min")
    assert calibrator.calibrate([1.0, 1.0]) == 1.0
    # (8 + ½) / 9 shrunk: sqrt(p (1 - p) / 8)
    p = 8.5 / 9
    assert calibrator.standard_error([1.0, 1.0]) == pytest.approx(math.sqrt(p * (1 - p) / 8), rel=1e-12)


def test_combinations_that_are_equal_as_fractions_tie() -> None:
    # The rollouts hold the same three ranks in every order, so all of them tie; their sums of floats differ.
    rows = tuple(itertools.permutations([1.0, 2.0, 3.0]))
    combined, calibrated = joint_leave_one_out(rows, "mean", (1 / 3,) * 3)
    assert len(set(combined)) == 1
    assert calibrated == [0.5] * 6


def test_weights_trade_off() -> None:
    rows = [[0.0, 3.0], [1.0, 2.0], [2.0, 1.0], [3.0, 0.0]]
    by_first = JointCalibrator(tuple(map(tuple, rows)), "mean", (0.9, 0.1))
    by_second = JointCalibrator(tuple(map(tuple, rows)), "mean", (0.1, 0.9))
    assert by_first.calibrate([2.5, 0.5]) == by_second.calibrate([0.5, 2.5]) == 0.75
    assert by_first.calibrate([0.5, 2.5]) == by_second.calibrate([2.5, 0.5]) == 0.25


@quick
@given(rows_of_two, st.sampled_from(COMBINES))
def test_leave_one_out_of_a_mix_has_mean_one_half(rows: list[tuple[float, float]], combine: Combine) -> None:
    _, calibrated = joint_leave_one_out(rows, combine, (0.3, 0.7))
    assert sum(calibrated) / len(calibrated) == pytest.approx(0.5, abs=1e-12)


def test_leave_one_out_of_a_mix_ranks_by_the_combination() -> None:
    # Ranks among four, half of one's own: (.125, .875), (.375, .625), (.625, .375), (.875, .125).
    rows = [[0.0, 3.0], [1.0, 2.0], [2.0, 1.0], [3.0, 0.0]]
    combined, calibrated = joint_leave_one_out(rows, "min", (0.5, 0.5))
    assert combined == [0.125, 0.375, 0.375, 0.125]
    assert calibrated == [0.5 / 3, 2.5 / 3, 2.5 / 3, 0.5 / 3]


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], "at least one"), ([[0.0]], "one score per reward"), ([[0.0, math.nan]], "not finite")],
)
def test_rows_that_do_not_fit_are_refused(rows: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JointCalibrator(tuple(map(tuple, rows)), "mean", (0.5, 0.5))


@pytest.mark.parametrize("candidate", [[0.0], [0.0, math.inf], [0.0, math.nan]])
def test_candidates_that_do_not_fit_are_refused(candidate: list[float]) -> None:
    calibrator = joint([[0.0, 0.0]], "mean")
    for apply in (calibrator.calibrate, calibrator.combined, calibrator.standard_error):
        with pytest.raises(ValueError, match=r"finite|one score per reward"):
            apply(candidate)
