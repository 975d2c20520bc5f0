"""What servers of rewards answer, checked and turned into numbers. Values in, values out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimtab_adapters.contract.errors import RewardError
from trimtab_adapters.contract.rewards import check_scores


@dataclass(frozen=True, slots=True)
class Label:
    """Which class of a classifier is the reward.

    Attributes:
        index: Counted from 0, or from the end when negative.
        names: The names of all classes, which each answer is checked against; None when they are not known.
    """

    index: int = -1
    names: tuple[str, ...] | None = None


def classify_scores(reward: str, answer: Any, num_inputs: int, label: Label, *, is_probability: bool) -> list[float]:
    """Values of one class from an answer of vLLM's `/classify`.

    Args:
        reward: Its name, for messages.
        answer: The JSON value.
        num_inputs: How many texts were sent.
        label: The class.
        is_probability: Whether they must be probabilities; else they are logits.

    Raises:
        RewardError: The answer is anything else than one finite number of that class per text.
    """
    scores = []
    for item in _in_order(reward, answer, num_inputs):
        values = item.get("probs")
        if not isinstance(values, list) or not values:
            raise RewardError(f"the server of the reward {reward!r} answered no class values")
        values = check_numbers(reward, values, len(values))
        if not -len(values) <= label.index < len(values):
            raise RewardError(
                f"the classifier of the reward {reward!r} has {len(values)} classes, and none with index {label.index}"
            )
        if label.names is not None:
            _check_names(reward, item.get("label"), values, label.names)
        scores.append(values[label.index])
    return _probabilities(reward, scores) if is_probability else scores


def score_scores(reward: str, answer: Any, num_inputs: int, *, is_probability: bool) -> list[float]:
    """Values from an answer of vLLM's `/score`. Arguments and errors as in `classify_scores`."""
    items = _in_order(reward, answer, num_inputs)
    scores = check_numbers(reward, [item.get("score") for item in items], num_inputs)
    return _probabilities(reward, scores) if is_probability else scores


def json_scores(reward: str, answer: Any, num_inputs: int) -> tuple[list[float], str]:
    """Scores and version from an answer of Trimtab's own contract, `{"rewards": [...], "version": "..."}`.

    Raises:
        RewardError: The answer is anything else than that, with one finite number per output.
    """
    if not isinstance(answer, dict) or not isinstance(answer.get("rewards"), list):
        raise RewardError(f"the server of the reward {reward!r} did not answer an object with an array `rewards`")
    version = answer.get("version")
    if not isinstance(version, str) or not 1 <= len(version) <= 256:
        raise RewardError(f"the server of the reward {reward!r} did not answer a `version` of 1 to 256 characters")
    return check_numbers(reward, answer["rewards"], num_inputs), version


def check_numbers(reward: str, values: Sequence[Any], num_inputs: int) -> list[float]:
    """`check_scores` for JSON, where `true` is no number. Raises `RewardError`."""
    for position, value in enumerate(values, start=1):
        if isinstance(value, bool):
            raise RewardError(
                f"the reward {reward!r} returned {str(value).lower()} instead of a number for output {position} of "
                f"{num_inputs}"
            )
    return check_scores(reward, values, num_inputs)


def _in_order(reward: str, answer: Any, num_inputs: int) -> list[dict[str, Any]]:
    """The objects of OpenAI's list answer by their `index`."""
    items = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise RewardError(f"the server of the reward {reward!r} did not answer an object with an array `data`")
    if len(items) != num_inputs:
        raise RewardError(f"the reward {reward!r} returned {len(items)} scores for {num_inputs} outputs")
    by_index = {item.get("index"): item for item in items if type(item.get("index")) is int}
    if by_index.keys() != set(range(num_inputs)):
        raise RewardError(f"the server of the reward {reward!r} did not number its scores from 0 to {num_inputs - 1}")
    return [by_index[index] for index in range(num_inputs)]


def _check_names(reward: str, predicted: Any, values: Sequence[float], names: Sequence[str]) -> None:
    """The server names only the class with the largest value; that one must be ours."""
    if len(values) != len(names):
        raise RewardError(f"the classifier of the reward {reward!r} has {len(values)} classes instead of {len(names)}")
    top = max(values)
    expected = [name for name, value in zip(names, values, strict=True) if value == top]
    if predicted not in expected:
        raise RewardError(f"the classifier of the reward {reward!r} calls its classes otherwise than registered")


def _probabilities(reward: str, scores: list[float]) -> list[float]:
    for position, score in enumerate(scores, start=1):
        if not 0.0 <= score <= 1.0 + math.ulp(1.0):
            raise RewardError(
                f"the server of the reward {reward!r} returned {score:g}, which is no probability, for output "
                f"{position} of {len(scores)}"
            )
    return scores
