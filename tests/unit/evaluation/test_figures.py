"""Two prompts with two samples each, small enough to be worked out by hand."""

import math

import numpy as np
import pytest

from trimtab_training.evaluation.draws import Draws
from trimtab_training.evaluation.figures import Measure
from trimtab_training.evaluation.intervals import Estimate, Intervals
from trimtab_training.evaluation.procedures import STANDARD, Chosen, Procedure, Served
from trimtab_training.evaluation.sample_cache import Sample
from trimtab_training.evaluation.scored import Outcome, Scored

BEST_OF_2 = Chosen("best", 2)
BOUND = math.log(2) - 1 / 2
MEASURE = Measure(Intervals(), "r", "judge", common_seeds=False)


def scored(rewards: list[list[float]], judged: list[list[float]], samples: list[list[Sample]]) -> Scored:
    return Scored(Draws(tuple(map(tuple, samples))), {"r": np.array(rewards), "judge": np.array(judged)})


PLAIN = Sample("", 2, 0.0, 0.0, "stop")
BASE = scored([[0.0, 1.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]], [[PLAIN] * 2] * 2)
HALF = scored([[0.0, 1.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]], [[PLAIN] * 2] * 2)
KIND = scored(
    [[1.0, 2.0], [3.0, 0.0]],
    [[4.0, 0.0], [0.0, 5.0]],
    [
        [Sample("", 1, 0.5, 0.4, "stop"), Sample("", 3, 1.0, 0.6, "stop")],
        [Sample("", 2, 2.0, 0.5, "length"), Sample("", 2, -1.0, 0.5, "stop")],
    ],
)


def outcome(name: str, side: Scored, procedure: Procedure = STANDARD) -> Outcome:
    return Outcome(name, procedure, side, "r")


def value(estimate: Estimate | None) -> float:
    assert estimate is not None
    return estimate.value


def test_plain_samples() -> None:
    figures = MEASURE.policy(KIND, BASE, is_exact=True)
    assert (figures.mean_tokens, figures.truncated) == (2.0, 0.25)
    assert value(figures.kl_to_base.per_sequence) == pytest.approx(0.5)
    assert value(figures.kl_to_base.per_token) == pytest.approx(2.0 / 8)
    assert value(figures.kl_to_base.per_sequence_log_ratio) == pytest.approx((0.75 + 0.5) / 2)
    assert value(figures.kl_to_base.per_token_log_ratio) == pytest.approx(2.5 / 8)
    assert figures.calibrated_reward.value == pytest.approx((3.5 / 4 + 3 / 4) / 2)
    inexact = MEASURE.policy(KIND, BASE, is_exact=False).kl_to_base
    assert inexact.per_sequence_log_ratio is inexact.per_token_log_ratio is None
    assert value(inexact.per_sequence) == pytest.approx(0.5)


def test_one_sample_is_shifted_by_its_token_kls() -> None:
    kl = MEASURE.outcome(outcome("kind", KIND), outcome("base", BASE), outcome("base", BASE), is_exact=True).kl_to_base
    assert [kl.selection_bound, value(kl.selection)] == pytest.approx([0.0, 0.0], abs=1e-12)
    assert [value(kl.shift), value(kl.total), value(kl.total_bound)] == pytest.approx([0.5] * 3)


def test_the_best_of_two_is_shifted_by_the_log_ratios_of_what_is_chosen() -> None:
    """Chosen are the second sample of the first prompt and the first one of the second: log-ratios 1 and 2."""
    kind, base = outcome("kind", KIND, BEST_OF_2), outcome("base", BASE, BEST_OF_2)
    figures = MEASURE.outcome(kind, base, outcome("base", BASE), is_exact=True)
    kl = figures.kl_to_base
    assert value(kl.shift) == pytest.approx(1.5)
    assert [value(kl.total), value(kl.total_bound)] == pytest.approx([1.5 + BOUND] * 2)
    assert figures.mean_reward.value == 2.5
    assert figures.mean_reward_gain.value == pytest.approx(2.5 - 0.5)
    assert value(figures.calibrated_reward) == 1.0
    assert value(figures.judge_mean_reward) == 0.0
    assert value(figures.judge_calibrated_reward) == pytest.approx((0.25 + 0.5) / 2)


def test_ties_cost_less_than_the_bound() -> None:
    """The base's second prompt has one reward only, so that choosing there changes nothing."""
    base = outcome("base", BASE, BEST_OF_2)
    kl = MEASURE.outcome(base, base, outcome("base", BASE), is_exact=True).kl_to_base
    assert kl.selection_bound == pytest.approx(BOUND)
    assert value(kl.selection) == pytest.approx(BOUND / 2)
    assert [value(kl.shift), value(kl.total), value(kl.total_bound)] == pytest.approx([0.0, BOUND / 2, BOUND])
    alone = MEASURE.outcome(base, base, outcome("base", BASE), is_exact=True)
    assert alone.calibrated_reward is None  # two of two samples leave none to compare with


def test_what_is_not_known_is_not_said() -> None:
    base = outcome("base", BASE)
    served = outcome("kind", KIND, Served("{}"))
    kl = MEASURE.outcome(served, base, base, is_exact=True).kl_to_base
    assert (kl.selection_bound, kl.selection, kl.total_bound, kl.total) == (None,) * 4
    assert value(kl.shift) == pytest.approx(0.625)
    assert MEASURE.outcome(served, base, base, is_exact=False).kl_to_base.shift is None
    tempered = MEASURE.outcome(outcome("kind", KIND, BEST_OF_2), base, base, is_exact=False).kl_to_base
    assert (tempered.shift, tempered.total_bound, tempered.total) == (None,) * 3
    assert value(tempered.selection) == pytest.approx(BOUND)


def test_win_rates_and_their_differences() -> None:
    rate = MEASURE.win_rate(outcome("kind", KIND), outcome("base", BASE))
    assert rate.win_rate.value == pytest.approx(0.8125)
    assert value(rate.judge_win_rate) == pytest.approx(((1 + 1 + 0 + 0.5) / 4 + (0.5 + 0.5 + 1 + 1) / 4) / 2)
    difference = MEASURE.difference(outcome("kind", KIND), outcome("half", HALF), outcome("base", BASE))
    assert (difference.policy, difference.other) == ("kind", "half")
    assert difference.difference.value == pytest.approx(0.8125 - 0.5)


def test_with_common_seeds_samples_of_one_index_do_not_meet() -> None:
    """First prompt: 1 against 1 and 2 against 0. Second: 3 against 0 and 0 against 0."""
    measure = Measure(Intervals(), "r", None, common_seeds=True)
    rate = measure.win_rate(outcome("kind", KIND), outcome("base", BASE))
    assert rate.win_rate.value == pytest.approx(((0.5 + 1) / 2 + (1 + 0.5) / 2) / 2)
    assert rate.judge_win_rate is None
    assert measure.policy(KIND, BASE, is_exact=True).calibrated_reward == rate.win_rate
