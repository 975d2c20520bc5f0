import json
from typing import Any

import pytest

from held_out_figures import estimate, good_figures
from trimtab_training.diagnostics import diagnose
from trimtab_training.evaluation.intervals import Estimate
from trimtab_training.gate import NOT_EVALUATED, GateResult, decide
from trimtab_training.gate_config import GateConfig


def gate(settings: dict[str, Any] | None = None, **changes: Any) -> GateResult:
    figures = good_figures(**changes)
    return decide(GateConfig(**(settings or {})), figures, diagnose(figures))


def failing(result: GateResult) -> list[str]:
    return [check.name for check in result.checks if not check.is_passed]


def test_a_good_run_passes_the_default_gate() -> None:
    result = gate()
    assert result.passed
    assert result.reasons == ()
    assert [check.name for check in result.checks] == [
        "min_reward_difference",
        "max_perplexity_ratio",
        "max_length_ratio",
        "min_length_ratio",
        "max_refusal_shift",
        "min_distinct_2_ratio",
    ]


@pytest.mark.parametrize(
    ("setting", "limit", "good", "bad"),
    [
        ("min_reward_difference", 0.0, estimate(0.0101), estimate(0.01)),
        ("min_reward_difference", 0.05, estimate(0.0601), estimate(0.0599)),
        ("min_served_win_rate", 0.55, estimate(0.5601), estimate(0.5599)),
        ("max_perplexity_ratio", 1.5, estimate(1.5), estimate(1.501)),
        ("max_kl_per_token", 0.3, estimate(0.3), estimate(0.301)),
        ("max_kl_per_output", 9.0, estimate(9.0), estimate(9.01)),
        ("max_length_ratio", 2.0, estimate(2.0), estimate(2.01)),
        ("min_length_ratio", 0.5, estimate(0.5), estimate(0.49)),
        ("max_refusal_shift", 0.05, estimate(0.05), estimate(0.051)),
        ("min_distinct_2_ratio", 0.7, estimate(0.7), estimate(0.69)),
        ("min_second_reward_difference", -0.02, estimate(-0.02), estimate(-0.021)),
    ],
)
def test_each_threshold_acts_on_its_own_figure(setting: str, limit: float, good: Estimate, bad: Estimate) -> None:
    figure = {
        "min_reward_difference": "reward_difference",
        "min_second_reward_difference": "second_reward_difference",
        "min_length_ratio": "length_ratio",
        "min_distinct_2_ratio": "distinct_2_ratio",
        "min_served_win_rate": "served_win_rate",
    }.get(setting, setting.removeprefix("max_"))
    assert gate({setting: limit}, **{figure: good}).passed
    result = gate({setting: limit}, **{figure: bad})
    assert not result.passed
    assert failing(result) == [setting]
    assert len(result.reasons) == 1
    assert setting in result.reasons[0]
    assert gate({setting: "off"}, **{figure: bad}).passed
    assert setting not in [check.name for check in gate({setting: None}).checks]


@pytest.mark.parametrize(
    ("setting", "changes"),
    [
        ("min_reward_difference", {"reward_difference": Estimate(0.4, None, None, None, "none")}),
        ("max_perplexity_ratio", {"perplexity_ratio": None}),
        ("max_kl_per_token", {"kl_per_token": None}),
        ("min_distinct_2_ratio", {"distinct_2_ratio": None}),
    ],
)
def test_a_figure_that_could_not_be_measured_does_not_pass(setting: str, changes: dict[str, Any]) -> None:
    result = gate({setting: 0.1}, **changes)
    assert failing(result) == [setting]
    assert "could not be measured" in result.reasons[0]


def test_outputs_of_single_tokens_need_no_variety() -> None:
    single = {"distinct_2": None}
    assert gate(base=single, steered=single, distinct_2_ratio=None).passed
    assert not gate(base=single, distinct_2_ratio=None).passed


def test_a_refused_failure_closes_the_gate_whatever_the_figures() -> None:
    collapsed = {"steered": {"entropy_per_token": estimate(0.01)}}
    result = gate(**collapsed)
    assert not result.passed
    assert result.reasons[0].startswith("collapsed_adapter: the entropy")
    assert failing(result) == []
    assert gate({"refused_signatures": []}, **collapsed).passed
    degraded = {"perplexity_ratio": estimate(3.0)}
    assert gate({"max_perplexity_ratio": 5.0}, **degraded).passed
    assert not gate({"max_perplexity_ratio": 5.0, "refused_signatures": ["degraded_fluency"]}, **degraded).passed


def test_without_an_evaluation_the_gate_is_closed() -> None:
    assert decide(GateConfig(min_reward_difference=None), None, []) == GateResult(False, (NOT_EVALUATED,))


def test_the_decision_is_plain_json() -> None:
    result = gate(perplexity_ratio=None)
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert data["passed"] is False
    assert data["checks"][1] == {
        "name": "max_perplexity_ratio",
        "figure": None,
        "limit": 1.5,
        "is_passed": False,
    }
