"""The field `calibration` of a request."""

from typing import Any

import pytest

from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_server.api.calibration_field import CalibrationField
from trimtab_server.api.validation import parse_body
from trimtab_server.decoding.scoring import CalibrationChoice


def choice(given: dict[str, Any], *, is_steered: bool = False, num_candidates: int = 4) -> CalibrationChoice:
    return parse_body(CalibrationField, given).choice(is_steered=is_steered, num_candidates=num_candidates)


@pytest.mark.parametrize(
    ("given", "expected", "effective"),
    [
        ({}, CalibrationChoice(), "reference"),
        ({"size": 32}, CalibrationChoice(size=32), "reference"),
        ({"size": 0}, CalibrationChoice(size=0), "none"),
        ({"method": "none"}, CalibrationChoice(method="none"), "none"),
        ({"method": "reference", "size": 8}, CalibrationChoice(size=8, method="reference"), "reference"),
        ({"method": "leave_one_out"}, CalibrationChoice(method="leave_one_out"), "leave_one_out"),
        ({"method": "pooled"}, CalibrationChoice(method="pooled"), "pooled"),
        ({"calibrator": "cal-1"}, CalibrationChoice(method="pooled", calibrator="cal-1"), "pooled"),
        (
            {"method": "pooled", "calibrator": "cal-1", "allow_stale": True},
            CalibrationChoice(method="pooled", calibrator="cal-1", allow_stale=True),
            "pooled",
        ),
    ],
)
def test_what_is_given_means_this(given: dict[str, Any], expected: CalibrationChoice, effective: str) -> None:
    assert choice(given) == expected
    assert choice(given).effective_method == effective


@pytest.mark.parametrize(
    ("given", "param", "message"),
    [
        ({"size": -1}, "size", "below minimum"),
        ({"size": 1025}, "size", "above maximum"),
        ({"size": "4"}, "size", "expected an integer"),
        ({"method": "best"}, "method", "Supported values"),
        ({"calibrator": ""}, "calibrator", "at least 1 character"),
        ({"calibrator": "../x"}, "calibrator", "match pattern"),
        ({"sise": 4}, "sise", "Unrecognized"),
        ({"method": "pooled", "size": 4}, "calibration.size", "only the method 'reference'"),
        ({"method": "leave_one_out", "size": 4}, "calibration.size", "only the method 'reference'"),
        ({"method": "none", "size": 4}, "calibration.size", "only the method 'reference'"),
        ({"calibrator": "cal-1", "size": 4}, "calibration.size", "only the method 'reference'"),
        ({"method": "reference", "size": 0}, "calibration.size", "at least one"),
        ({"method": "reference", "calibrator": "cal-1"}, "calibration.calibrator", "only for the method 'pooled'"),
        ({"allow_stale": True}, "calibration.allow_stale", "only for the method 'pooled'"),
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as refused:
        choice(given)
    assert refused.value.param == param


def test_leave_one_out_is_for_at_least_two_candidates_of_the_base_itself() -> None:
    with pytest.raises(InvalidRequestError, match="request is steered"):
        choice({"method": "leave_one_out"}, is_steered=True)
    with pytest.raises(InvalidRequestError, match="at least 2"):
        choice({"method": "leave_one_out"}, num_candidates=1)
    assert choice({"method": "leave_one_out"}, num_candidates=2).method == "leave_one_out"
    assert choice({"size": 4}, is_steered=True, num_candidates=1).size == 4
