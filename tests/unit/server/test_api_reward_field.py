"""What a caller may write for `reward`."""

from typing import Any

import pytest

from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_adapters.contract.rewards import RewardMix
from trimtab_server.api.reward_field import parse_reward


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("helpful", "helpful"),
        ("a" * 64, "a" * 64),
        ({"helpful": 0.7, "harmless": 0.3}, RewardMix(weights={"helpful": 0.7, "harmless": 0.3})),
        ({"helpful": 2}, RewardMix(weights={"helpful": 2.0})),
        ({"combine": "min", "weights": {"a": 1, "b": 1}}, RewardMix(combine="min", weights={"a": 1.0, "b": 1.0})),
        ({"combine": "product", "weights": {"a": 1}}, RewardMix(combine="product", weights={"a": 1.0})),
        ({"weights": {"a": 1}}, RewardMix(weights={"a": 1.0})),
        # Rewards that are called like the fields.
        ({"weights": 1.0, "b": 1.0}, RewardMix(weights={"weights": 1.0, "b": 1.0})),
        ({"combine": 1.0}, RewardMix(weights={"combine": 1.0})),
        (RewardMix(weights={"a": 1.0}), RewardMix(weights={"a": 1.0})),
    ],
)
def test_a_name_or_weights_are_a_choice(value: Any, expected: Any) -> None:
    assert parse_reward(value) == expected


@pytest.mark.parametrize(
    ("value", "param", "code", "words"),
    [
        (3, "reward", "invalid_type", "a string or an object, but got an integer"),
        (None, "reward", "invalid_type", "but got null"),
        (["a"], "reward", "invalid_type", "but got an array"),
        ("", "reward", "invalid_value", "1 to 64 letters"),
        ("two words", "reward", "invalid_value", "1 to 64 letters"),
        ("a" * 65, "reward", "invalid_value", "1 to 64 letters"),
        ("a\n", "reward", "invalid_value", "1 to 64 letters"),
        ({}, "reward", "invalid_value", "expected 1 to 16 rewards with their weights, but got 0"),
        ({f"r{i}": 1.0 for i in range(17)}, "reward", "invalid_value", "but got 17"),
        ({"a": "1"}, "reward.a", "invalid_type", "expected a decimal, but got a string"),
        ({"a": True}, "reward.a", "invalid_type", "but got a boolean"),
        ({"a": None}, "reward.a", "invalid_type", "but got null"),
        ({"a": 0}, "reward.a", "invalid_value", "finite number above 0"),
        ({"a": -1.0}, "reward.a", "invalid_value", "finite number above 0"),
        ({"a": float("nan")}, "reward.a", "invalid_value", "finite number above 0"),
        ({"a": float("inf")}, "reward.a", "invalid_value", "finite number above 0"),
        ({"a": 10**400}, "reward.a", "invalid_value", "finite number above 0"),
        ({"a b": 1.0}, "reward", "invalid_value", "1 to 64 letters"),
        ({"combine": "max", "weights": {"a": 1}}, "reward.combine", "invalid_value", "'mean', 'min' and 'product'"),
        ({"combine": 3, "weights": {"a": 1}}, "reward.combine", "invalid_value", "Supported values"),
        ({"combine": "min"}, "reward.weights", "missing_required_parameter", "Missing required parameter"),
        ({"combine": "min", "weights": 1}, "reward.weights", "invalid_type", "expected an object"),
        ({"combine": "min", "weights": {}}, "reward.weights", "invalid_value", "but got 0"),
        ({"combine": "min", "weights": {"a": "x"}}, "reward.weights.a", "invalid_type", "expected a decimal"),
        ({"weights": {"a": 1}, "scale": 2}, "reward.scale", "unknown_parameter", "reward.scale"),
    ],
)
def test_anything_else_is_refused_by_the_part_at_fault(value: Any, param: str, code: str, words: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_reward(value)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert words in caught.value.message
