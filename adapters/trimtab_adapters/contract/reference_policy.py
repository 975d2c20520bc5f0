"""What a calibrator holds for: the reference policy, that is the base model, unsteered, at certain sampling settings.

C(x, y) is a statement about samples of one policy. It is void for another base, another chat template or another
temperature, so every calibrator carries the policy it was made from and is compared with the one that is asked for.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from trimtab_adapters.contract.records import Rollout

_NOT_SAMPLING = {
    # what is asked, and how the answer is shown
    *("prompt", "messages", "logprobs", "top_logprobs", "return_token_ids", "prompt_logprobs", "echo"),
    # how and when it is computed
    *("stream_interval", "priority"),
    # which of the draws
    "seed",
}
"""Fields of an engine's request body that do not change the distribution of the text that follows a given prompt."""

_ENDED = ("stop", "length", "tool_calls", "function_call", "content_filter")
"""Finish reasons of an output that nobody cut short."""

ENDPOINT = "endpoint"
IDENTITY = "base_identity"
SELECTION = "selection"
NUM_LEFT_OUT = "num_left_out"
"""Entries of a rollout's metadata: the engine's route of a reference rollout, which base generated, the strategy where
it is not the best of N, and how many candidates of the same request failed and are not logged."""


@dataclass(frozen=True, slots=True)
class ReferencePolicy:
    """The base model without steering, at certain sampling settings.

    Attributes:
        base_model: Public name of the base.
        endpoint: `completions` or `chat.completions`: a chat's text is what its parsers leave of the output.
        sampling: The settings as canonical JSON, without seed and without what only concerns display.
        identity: What the engine tells of the base behind the name; None where that is not known.
    """

    base_model: str
    endpoint: str
    sampling: str
    identity: str | None = None

    @classmethod
    def of(cls, base_model: str, endpoint: str, body: Mapping[str, Any], *, identity: str | None = None) -> Self:
        """The policy that answers an engine's request body."""
        settings = {key: value for key, value in body.items() if key not in _NOT_SAMPLING}
        return cls(base_model, endpoint, _canonical(settings), identity)

    @classmethod
    def of_rollout(cls, rollout: Rollout) -> Self | None:
        """The policy that a logged rollout is an independent sample of; None when it is not one of any.

        Not one are: steered rollouts; those drawn with a seed, which another request may have drawn as well; those that
        were cut short; those of a strategy that stopped or branched by what it saw; those whose request left some out.
        """
        endpoint = rollout.metadata.get(ENDPOINT) if rollout.endpoint == "reference" else rollout.endpoint
        is_steered = not rollout.is_plain or any(weight.alpha != 0.0 for weight in rollout.steering)
        if is_steered or "seed" in rollout.sampling or rollout.finish_reason not in _ENDED:
            return None
        is_chosen_from = "selection" in rollout.sampling or rollout.metadata.keys() & {SELECTION, NUM_LEFT_OUT}
        if is_chosen_from or endpoint not in ("completions", "chat.completions"):
            return None
        return cls.of(rollout.base_model, endpoint, rollout.sampling, identity=rollout.metadata.get(IDENTITY))

    @classmethod
    def from_key(cls, key: str) -> Self:
        """The policy of a `key`. Raises `ValueError` for any other text."""
        try:
            fields = json.loads(key)
            return cls(fields["base_model"], fields["endpoint"], _canonical(fields["sampling"]), fields["identity"])
        except (ValueError, KeyError, TypeError) as exc:
            raise ValueError("not the key of a reference policy") from exc

    @property
    def key(self) -> str:
        """The policy as one text; equal for equal policies."""
        return _canonical(
            {
                "base_model": self.base_model,
                "endpoint": self.endpoint,
                "identity": self.identity,
                "sampling": json.loads(self.sampling),
            }
        )

    @property
    def digest(self) -> str:
        """Hash of `key`, 64 hex digits."""
        return hashlib.sha256(self.key.encode()).hexdigest()

    def identified(self, identity: str | None) -> Self:
        """The same policy of a base that is known better."""
        return replace(self, identity=identity)

    def differences(self, other: "ReferencePolicy") -> list[str]:
        """What differs in `other`, each as `field: this one's value, not the other's`."""
        found = [
            f"{name}: {mine!r}, not {theirs!r}"
            for name in ("base_model", "identity", "endpoint")
            if (mine := getattr(self, name)) != (theirs := getattr(other, name))
        ]
        mine, theirs = json.loads(self.sampling), json.loads(other.sampling)
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name, _ABSENT) != theirs.get(name, _ABSENT):
                found.append(f"{name}: {_shown(mine, name)}, not {_shown(theirs, name)}")
        return found


_ABSENT = object()


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return json.dumps(settings[name]) if name in settings else "absent"


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
