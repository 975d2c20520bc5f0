"""What bases outside vLLM can do, and why they refuse the rest."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from trimtab_adapters.contract.sampling import UnseenTokens

Api = Literal["openai", "vllm"]
"""How the base's API is spoken to. `openai`: OpenAI's legacy completions and nothing else. `vllm`: vLLM's server, which
gives token ids and understands more fields."""

_OPENAI = frozenset({"temperature", "top_p", "frequency_penalty", "presence_penalty", "logit_bias", "stop", "seed"})
_VLLM = frozenset(
    {
        *("top_k", "min_p", "allowed_token_ids", "min_tokens", "ignore_eos", "stop_token_ids"),
        *("include_stop_str_in_output", "skip_special_tokens"),
    }
)
PASSED_ON: Mapping[Api, frozenset[str]] = {"openai": _OPENAI, "vllm": _OPENAI | _VLLM}
"""Fields that an API understands as they are: an unsteered answer that needs no others is one request to it."""


@dataclass(frozen=True, slots=True)
class BaseKind:
    """What a base of one kind can do.

    Attributes:
        name: For messages.
        passed_on: Fields that it understands as they are: an unsteered answer that needs no others is one request to
            it. None where all answers are sampled here.
        shows_all: Whether the sampler knows the probability of every token.
        why: Why it refuses a field.
        why_else: Why it refuses any other.
        cannot: Fields that other kinds of bases understand.
    """

    name: str
    passed_on: frozenset[str] | None
    shows_all: bool
    why: Mapping[str, str]
    why_else: str
    cannot: frozenset[str] = frozenset()


def black_box_kind(api: Api, unseen: UnseenTokens) -> BaseKind:
    """A base behind somebody else's API."""
    return BaseKind(
        name="a black-box base",
        passed_on=PASSED_ON[api],
        shows_all=unseen != "exclude",
        why={
            "repetition_penalty": "it multiplies logits, and a black box shows log-probabilities only",
            "response_format": "a grammar needs the base's logits of every token",
            "structured_outputs": "a grammar needs the base's logits of every token",
            "prompt_logprobs": "they would cost a request of their own for the prompt",
            "echo": "log-probabilities of the prompt would cost a request of their own",
            "bad_words": "give the token ids in 'logit_bias' instead",
            "tools": "tool calls need a parser of the base's own server",
            "content": "only text can be sent to it",
        },
        why_else="the gateway cannot do it on behalf of a base behind an API",
    )


def transformers_kind(*, has_encoder: bool) -> BaseKind:
    """A base in the gateway's own process."""
    encoder = {"continue_final_message": "an encoder reads the whole prompt, so its last message cannot be continued"}
    return BaseKind(
        name="a base that runs in transformers",
        passed_on=None,
        shows_all=True,
        why={
            "bad_words": "give the token ids in 'logit_bias' instead",
            "content": "only text can be sent to it",
            **(encoder if has_encoder else {}),
        },
        why_else="only an engine of vLLM can",
        cannot=frozenset(encoder) if has_encoder else frozenset(),
    )
