"""The field `reward` of request bodies and of routes: a registered reward's name, or several with weights."""

import math
import re
from typing import Any

from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_adapters.contract.rewards import RewardChoice, RewardMix
from trimtab_server.api.validation import type_name

MAX_PARTS = 16

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_COMBINE = ("mean", "min", "product")
_FIELDS = {"combine", "weights"}


def parse_reward(value: Any) -> RewardChoice:
    """What a caller wrote for `reward`.

    `"helpful"` is a registered reward. `{"helpful": 0.7, "harmless": 0.3}` is the weighted mean of two, and
    `{"combine": "min", "weights": {...}}` names another way to combine them. Rewards that are called `combine` or
    `weights` can be named in the longer form.

    Raises:
        InvalidRequestError: It is neither; the message and `param` name the part at fault, such as
            `reward.weights.helpful`.
    """
    if isinstance(value, RewardMix):
        return value
    if isinstance(value, str):
        _check_name(value, "reward")
        return value
    if not isinstance(value, dict):
        raise InvalidRequestError(
            f"Invalid type for 'reward': expected a string or an object, but got {type_name(value)} instead.",
            param="reward",
            code="invalid_type",
        )
    # With `weights` as an object it is the longer form: a weight is a number.
    if isinstance(value.get("weights"), dict) or isinstance(value.get("combine"), str):
        return _parse_mix(value)
    return RewardMix(weights=_parse_weights(value, "reward"))


def _parse_mix(value: dict[str, Any]) -> RewardMix:
    if unknown := sorted(set(value) - _FIELDS):
        raise InvalidRequestError(
            f"Unrecognized request argument supplied: reward.{unknown[0]}",
            param=f"reward.{unknown[0]}",
            code="unknown_parameter",
        )
    combine = value.get("combine", "mean")
    if combine not in _COMBINE:
        raise InvalidRequestError(
            f"Invalid value: {combine!r}. Supported values are: 'mean', 'min' and 'product'.",
            param="reward.combine",
            code="invalid_value",
        )
    if "weights" not in value:
        raise InvalidRequestError(
            "Missing required parameter: 'reward.weights'.",
            param="reward.weights",
            code="missing_required_parameter",
        )
    weights = value["weights"]
    if not isinstance(weights, dict):
        raise InvalidRequestError(
            f"Invalid type for 'reward.weights': expected an object, but got {type_name(weights)} instead.",
            param="reward.weights",
            code="invalid_type",
        )
    return RewardMix(combine=combine, weights=_parse_weights(weights, "reward.weights"))


def _parse_weights(weights: dict[str, Any], param: str) -> dict[str, float]:
    if not 1 <= len(weights) <= MAX_PARTS:
        raise InvalidRequestError(
            f"Invalid '{param}': expected 1 to {MAX_PARTS} rewards with their weights, but got {len(weights)}.",
            param=param,
            code="invalid_value",
        )
    parsed = {}
    for name, weight in weights.items():
        _check_name(name, param)
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise InvalidRequestError(
                f"Invalid type for '{param}.{name}': expected a decimal, but got {type_name(weight)} instead.",
                param=f"{param}.{name}",
                code="invalid_type",
            )
        parsed[name] = _finite_above_zero(weight, f"{param}.{name}")
    return parsed


def _finite_above_zero(weight: float, param: str) -> float:
    try:
        number = float(weight)
    except OverflowError:
        number = math.inf
    if not 0.0 < number < math.inf:
        raise InvalidRequestError(
            f"Invalid '{param}': a weight must be a finite number above 0.", param=param, code="invalid_value"
        )
    return number


def _check_name(name: str, param: str) -> None:
    if _NAME.fullmatch(name) is None:
        raise InvalidRequestError(
            f"Invalid '{param}': a reward's name has 1 to 64 letters, digits, '.', '_' and '-', and begins with a "
            "letter or digit.",
            param=param,
            code="invalid_value",
        )
