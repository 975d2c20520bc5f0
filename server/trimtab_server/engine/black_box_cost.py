"""What a provider bills for an answer that is made of many calls."""

from dataclasses import dataclass, fields
from typing import Any


@dataclass(slots=True)
class Cost:
    """Sums over calls, as the provider's own `usage` says. Calls that failed are not in it: nobody knows their price.

    Attributes:
        calls: Calls that were answered.
        prompt_tokens: Prompt tokens of all of them: each call sends the prompt and the answer so far again.
        completion_tokens: Tokens that the provider generated.
        cached_tokens: Those of the prompt tokens that it found in its cache, which many bill at a lower price.
        unmapped_tokens: Among the most probable tokens shown, those that the gateway's tokenizer does not know and that
            could not be sampled therefore; no cost, but part of what the answer is made of.
        resplit_calls: Calls whose prompt the provider split into another number of tokens than the adapter LMs read,
            as can happen when prompts are sent as text.
    """

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    unmapped_tokens: int = 0
    resplit_calls: int = 0

    def add(self, other: "Cost") -> None:
        """Add another's sums."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def take(self) -> "Cost":
        """These sums, which are 0 here from now on: what several answers share is billed once."""
        taken = Cost()
        taken.add(self)
        for field in fields(self):
            setattr(self, field.name, 0)
        return taken

    def to_usage(self) -> dict[str, int]:
        """For an answer's usage object."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {
            "total_tokens": self.prompt_tokens + self.completion_tokens
        }


def cost_of(usage: dict[str, Any] | None) -> Cost:
    """One call's, from the provider's usage object."""
    usage = usage or {}
    details = usage.get("prompt_tokens_details") or {}
    return Cost(
        calls=1,
        prompt_tokens=int(usage.get("prompt_tokens") or 0),
        completion_tokens=int(usage.get("completion_tokens") or 0),
        cached_tokens=int(details.get("cached_tokens") or 0),
    )
