"""Answers whose tokens are sampled in the gateway's process: what passes between its engine and the sampler.

Where the base is behind somebody else's API, that shows the most probable next tokens and nothing else of the
distribution. Numbers and settings only: no torch, no HTTP.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from trimtab_adapters.contract.engine_api import CacheStatus, LoadedVersion, WeightStatus

UnseenTokens = Literal["exclude", "residual"]
"""What becomes of tokens that the API does not show. `exclude`: they cannot be sampled, so the adapter LM reorders what
the API shows and brings nothing in. `residual`: the rest of the probability is spread evenly over them."""


@dataclass(frozen=True, slots=True)
class ContextLimits:
    """How long texts may be, in tokens.

    Attributes:
        prompt: Longest prompt.
        output: Longest answer.
        total: Most tokens of both together; what adapter LMs, which read both, must allow.
    """

    prompt: int
    output: int
    total: int

    @classmethod
    def shared(cls, total: int) -> "ContextLimits":
        """Of a decoder-only model, whose prompt and answer share its positions."""
        return cls(prompt=total - 1, output=total - 1, total=total)


@dataclass(frozen=True, slots=True)
class TopLogprobs:
    """The most probable next tokens of the base, the most probable first; k of them.

    Attributes:
        token_ids: `[k]`, distinct.
        logprobs: `[k]` natural logarithms of probabilities in the base's whole distribution, so their sum is below 1.
    """

    token_ids: Sequence[int]
    logprobs: Sequence[float]


@dataclass(frozen=True, slots=True)
class SamplingRules:
    """How a token is sampled from steered logits. Defaults sample from the distribution as it is.

    Bias and minimum act before steering, penalties after it, then temperature, min-p, top-k and top-p, as in vLLM 0.32.

    Attributes:
        temperature: Below `GREEDY_BELOW` the most probable token is taken.
        top_p: Smallest set of tokens with at least this probability.
        top_k: So many tokens; 0 means all.
        min_p: Only tokens with at least this fraction of the largest probability.
        frequency_penalty: Taken off a token's logit for each time that it was sampled.
        presence_penalty: Taken off once.
        logit_bias: Added to base logits.
        allowed_token_ids: Others cannot be sampled; None allows all.
        min_tokens: Before so many tokens none of `ending_ids` can be sampled.
        ending_ids: Tokens that end an answer.
        num_top: How many of the most probable tokens to report beside the sampled one.
        seed: Same seed, same tokens; None takes fresh random numbers.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: frozenset[int] | None = None
    min_tokens: int = 0
    ending_ids: frozenset[int] = frozenset()
    num_top: int = 0
    seed: int | None = None


GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy, as in vLLM."""


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token of an answer.

    Attributes:
        token_id: It.
        logprob: Its log-probability before temperature: steered, or the base's of an unsteered answer.
        top: The most probable tokens with theirs, the most probable first.
    """

    token_id: int
    logprob: float
    top: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True, slots=True)
class SteeringStatus:
    """What the adapter LMs in the gateway's process do; names are those of `EngineStatus`."""

    versions: list[LoadedVersion]
    cache: CacheStatus
    weights: WeightStatus
    steered_rows: int
    steered_steps: int
    failed_rows: int
