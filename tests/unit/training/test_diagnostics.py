from typing import Any

import pytest

from held_out_figures import estimate, good_figures
from trimtab_training.diagnostics import diagnose
from trimtab_training.evaluation.intervals import Estimate

ALONE = Estimate(0.4, None, None, None, "none")
"""Of a single prompt."""


def signatures(**changes: Any) -> list[str]:
    return [found.signature for found in diagnose(good_figures(**changes))]


def test_a_good_run_has_no_diagnosis() -> None:
    assert signatures() == []


@pytest.mark.parametrize(
    ("changes", "is_collapsed"),
    [
        ({"distinct_2_ratio": estimate(0.49)}, True),
        ({"distinct_2_ratio": estimate(0.5)}, False),
        ({"distinct_2_ratio": None}, False),
        ({"steered": {"entropy_per_token": estimate(0.099)}}, True),
        ({"steered": {"entropy_per_token": estimate(0.1)}}, False),
        # a base that is as certain itself
        ({"steered": {"entropy_per_token": estimate(0.06)}, "base": {"entropy_per_token": estimate(0.11)}}, False),
        ({"steered": {"entropy_per_token": estimate(0.06)}, "base": {"entropy_per_token": estimate(0.13)}}, True),
        ({"steered": {"entropy_per_token": None}}, False),
        ({"steered": {"repeat_rate": estimate(0.5)}}, True),
        ({"steered": {"repeat_rate": estimate(0.49)}}, False),
        # a base that repeats itself
        ({"steered": {"repeat_rate": estimate(0.6)}, "base": {"repeat_rate": estimate(0.31)}}, False),
        ({"steered": {"repeat_rate": estimate(0.6)}, "base": {"repeat_rate": estimate(0.3)}}, True),
        ({"steered": {"repeat_rate": None}, "base": {"repeat_rate": None}}, False),
    ],
)
def test_a_collapsed_adapter_is_told_by_variety_entropy_or_repeats(changes: dict[str, Any], is_collapsed: bool) -> None:
    assert signatures(**changes) == (["collapsed_adapter"] if is_collapsed else [])


def test_all_signs_of_a_collapse_are_given() -> None:
    changes = {"entropy_per_token": estimate(0.01), "repeat_rate": estimate(0.9)}
    (found,) = diagnose(good_figures(distinct_2_ratio=estimate(0.1), steered=changes))
    assert found.evidence == (
        "distinct-2 is 0.10 of the base's (below 0.5); the entropy is 0.010 nats per token (below 0.1; the base's "
        "2.000); two outputs for a prompt are the same with probability 0.90 (from 0.5 on; the base's 0.05)"
    )


@pytest.mark.parametrize(
    ("difference", "evidence"),
    [
        (estimate(0.011, 0.01), None),
        (estimate(0.01, 0.01), "contains 0"),
        (estimate(0.0, 0.01), "contains 0"),
        (estimate(-0.02, 0.01), "lies below 0"),
        (ALONE, "a single held-out prompt"),
    ],
)
def test_no_improvement_is_an_interval_that_does_not_lie_above_0(difference: Estimate, evidence: str | None) -> None:
    found = diagnose(good_figures(reward_difference=difference))
    assert [diagnosis.signature for diagnosis in found] == ([] if evidence is None else ["no_improvement"])
    assert all(evidence is not None and evidence in diagnosis.evidence for diagnosis in found)


@pytest.mark.parametrize(("ratio", "is_degraded"), [(1.5, False), (1.51, True), (0.2, False)])
def test_degraded_fluency_is_a_perplexity_beyond_a_factor(ratio: float, is_degraded: bool) -> None:
    assert signatures(perplexity_ratio=estimate(ratio)) == (["degraded_fluency"] if is_degraded else [])


def test_a_perplexity_that_could_not_be_measured_shows_nothing() -> None:
    assert signatures(perplexity_ratio=None) == []


@pytest.mark.parametrize(
    ("first", "second", "is_found"),
    [
        (estimate(0.1), estimate(-0.1), True),
        (estimate(0.1), estimate(-0.009), False),
        (estimate(0.1), estimate(0.1), False),
        (estimate(0.1), ALONE, False),
    ],
)
def test_over_optimisation_is_a_second_reward_that_falls_while_the_first_rises(
    first: Estimate, second: Estimate, is_found: bool
) -> None:
    found = signatures(reward_difference=first, second_reward_difference=second)
    assert found == (["over_optimisation"] if is_found else [])


def test_a_second_reward_that_falls_together_with_the_first_is_no_over_optimisation() -> None:
    found = signatures(reward_difference=estimate(-0.1), second_reward_difference=estimate(-0.1))
    assert found == ["no_improvement"]
