"""What is measured of a peer: how long, how many calls, which parameters arrive, and whether its usage is right."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from harness.counting_proxy import Call
from harness.peers import PeerAnswer

PROBE: Final[Mapping[str, Any]] = {
    "temperature": 0.7,
    "top_p": 0.9,
    "max_tokens": 24,
    "stop": ["zebra"],
    "seed": 7,
    "presence_penalty": 0.3,
    "frequency_penalty": 0.2,
    "logit_bias": {"5": -2.0},
    "logprobs": True,
}
"""Nine sampling parameters, none at its default."""


@dataclass(slots=True)
class Tally:
    """What one peer did over the prompts.

    Attributes:
        wall_s: Per request.
        calls: Upstream calls that generate, per request.
        texts: Its choices.
        completion_right: Per request, whether it reported the completion tokens that the engine counted.
        prompt_right: Whether it reported the prompt's tokens: those of one candidate, or of all upstream calls.
    """

    wall_s: list[float] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    completion_right: list[bool] = field(default_factory=list)
    prompt_right: list[bool] = field(default_factory=list)

    def add(self, answer: PeerAnswer, calls: Sequence[Call]) -> None:
        """Count one request with the calls that went upstream for it."""
        generations = [call for call in calls if call.is_generation]
        prompts = [call.tokens("prompt_tokens") for call in generations]
        self.wall_s.append(answer.wall_s)
        self.calls.append(len(generations))
        self.texts.append(answer.text)
        self.completion_right.append(
            answer.completion_tokens == sum(call.tokens("completion_tokens") for call in generations)
        )
        self.prompt_right.append(bool(prompts) and answer.prompt_tokens in (prompts[0], sum(prompts)))

    def figures(self) -> dict[str, Any]:
        """Medians and shares."""
        return {
            "median_s": statistics.median(self.wall_s),
            "upstream_calls": statistics.median(self.calls),
            "completion_tokens_right": sum(self.completion_right) / len(self.completion_right),
            "prompt_tokens_right": sum(self.prompt_right) / len(self.prompt_right),
        }


def honoured(answer: PeerAnswer, calls: Sequence[Call], num: int) -> list[str]:
    """Which parameters of `PROBE` reached every call that generates candidates, or show in the answer.

    Args:
        answer: To a request with `PROBE`.
        calls: What went upstream for it.
        num: Candidates; candidate i may have the seed plus i.
    """
    generations = [call.body for call in calls if call.is_generation and not _is_judge(call.body)]
    if not generations:
        return []
    arrived = [name for name in PROBE if all(_has(body, name, num) for body in generations)]
    return [name for name in arrived if name != "logprobs"] + (["logprobs"] if answer.has_logprobs else [])


def _is_judge(body: Mapping[str, Any]) -> bool:
    """Calls in which a model rates or chooses: more messages than the caller's, or a schema for the answer."""
    asks = [message for message in body.get("messages", ()) if message.get("content")]
    return len(asks) > 1 or bool(body.get("response_format"))


def _has(body: Mapping[str, Any], name: str, num: int) -> bool:
    value = body.get(name)
    if name == "max_tokens" and value is None:
        value = body.get("max_completion_tokens")
    if name == "seed":
        return isinstance(value, int) and PROBE["seed"] <= value < PROBE["seed"] + num
    if name == "stop" and isinstance(value, str):
        value = [value]
    if isinstance(PROBE[name], float) and isinstance(value, int | float):
        return bool(abs(value - PROBE[name]) < 1e-6)  # some send it as a 32-bit number
    return bool(value == PROBE[name])
