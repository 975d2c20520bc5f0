"""The pseudo language model behind the fake engine: words by hash, every token reproducible.

Ids 0-255 are bytes, for prompts; 256 and up are the words that it says. A token depends on the prompt, the position,
the steering (exact versions and alphas) and, unless greedy, the seed.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimtab_adapters.contract.params import AdapterWeight

BASE_WORDS = (
    *("river", "stone", "cloud", "morning", "window", "paper", "garden", "lantern"),
    *("copper", "valley", "thread", "harbour", "winter", "market", "signal", "meadow"),
)
STEERED_WORDS = (
    *("kind", "gentle", "bright", "warm", "calm", "tender", "patient", "clear"),
    *("honest", "quiet", "steady", "open", "careful", "graceful", "loyal", "merry"),
)
WORDS = tuple(f" {word}" for word in (*BASE_WORDS, *STEERED_WORDS))
FIRST_WORD_ID = 256
VOCAB_SIZE = FIRST_WORD_ID + len(WORDS)


@dataclass(frozen=True, slots=True)
class FakeToken:
    """One generated token; log-probabilities are named by origin."""

    id: int
    text: str
    base_logprob: float
    adapter_logprobs: tuple[float, ...]
    steered_logprob: float


def tokenize(text: str) -> list[int]:
    """One id per byte of the UTF-8 text."""
    return list(text.encode())


def detokenize(token_ids: Sequence[int]) -> str:
    """Bytes and words back to text."""
    parts = [bytes([i]) if i < FIRST_WORD_ID else WORDS[i - FIRST_WORD_ID].encode() for i in token_ids]
    return b"".join(parts).decode(errors="replace")


def token_text(token_id: int) -> str:
    """Text of one token."""
    return detokenize([token_id])


def next_token(
    prompt_token_ids: Sequence[int],
    position: int,
    steering: Sequence[AdapterWeight],
    *,
    seed: int | str | None,
    greedy: bool,
) -> FakeToken:
    """The token at a position of the output; steered text uses other words than the base's."""
    active = [weight for weight in steering if weight.alpha != 0.0]
    key = [list(prompt_token_ids), position, [[w.version, w.alpha] for w in active], None if greedy else seed]
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    half = len(BASE_WORDS)
    index = digest[0] % half + (half if active else 0)
    base = -0.1 - digest[1] / 64
    adapters = tuple(-0.1 - digest[2 + i] / 64 for i in range(len(active)))
    steered = min(-0.01, base + 0.25 * sum(w.alpha for w in active)) if active else base
    return FakeToken(FIRST_WORD_ID + index, WORDS[index], base, adapters, steered)


def render_chat(messages: Sequence[dict[str, Any]]) -> str:
    """A chat template: one line per message and the assistant's turn."""
    lines = [f"{m.get('role')}: {m.get('content') or ''}" for m in messages]
    return "\n".join([*lines, "assistant:"])


def kl_of(token: FakeToken) -> float:
    """A made-up but non-negative KL, 0 without steering."""
    return math.fabs(token.steered_logprob - token.base_logprob)
