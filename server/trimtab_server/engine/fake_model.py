"""The pseudo language model behind the fake engine: words by hash, every token reproducible.

Ids 0-255 are bytes, for prompts; 256 and up are the words that it says. A token depends on the prompt, the position,
the steering (exact versions, alphas and guidance) and, unless greedy, the seed.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from trimtab_adapters.contract.params import AdapterWeight, Guidance, SteeringParams
from trimtab_adapters.contract.records import Alternative, Alternatives

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
    """One generated token; log-probabilities are named by origin, None where a schedule kept it from being used."""

    id: int
    text: str
    base_logprob: float
    adapter_logprobs: tuple[float | None, ...]
    steered_logprob: float
    negative_logprob: float | None = None
    is_steered: bool = False


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
    return _next(list(prompt_token_ids), position, [w for w in steering if w.alpha != 0.0], None, None, seed, greedy)


def next_token_of(
    prompt_token_ids: Sequence[int], position: int, params: SteeringParams, *, seed: int | str | None, greedy: bool
) -> FakeToken:
    """The same for a whole steering: nothing acts outside the schedule, and `max_kl` bounds what `kl_of` gives."""
    operators = params.operators
    acts = operators.schedule is None or operators.schedule.factor(position) > 0
    if not acts:
        token = next_token(prompt_token_ids, position, (), seed=seed, greedy=greedy)
        return replace(token, adapter_logprobs=(None,) * len(params.active))
    return _next(list(prompt_token_ids), position, params.active, params.guidance, operators.max_kl, seed, greedy)


def alternatives_of(token: FakeToken, params: SteeringParams) -> Alternatives:
    """Words of the base before, and of the steering after it, if it moved anything; the most probable first.

    With a plausibility mask all words but the base's first are excluded.
    """
    half, number = len(BASE_WORDS), (token.id - FIRST_WORD_ID) % len(BASE_WORDS)
    masks = token.is_steered and params.operators.plausibility is not None
    shift = 1.0 if token.is_steered else 0.0

    def side(first_id: int, base_gap: float, steered_gap: float) -> list[Alternative]:
        return [
            Alternative(
                token_id=first_id + (number + i) % half,
                base=token.base_logprob - base_gap - i,
                steered=None if masks and base_gap + i > 0 else token.steered_logprob - steered_gap - i,
            )
            for i in range(min(params.num_alternatives or 0, half))
        ]

    before = side(FIRST_WORD_ID, 0.0, shift)
    return Alternatives(before=before, after=side(FIRST_WORD_ID + half, shift, 0.0) if token.is_steered else before)


def _next(
    prompt: list[int],
    position: int,
    active: Sequence[AdapterWeight],
    guidance: Guidance | None,
    max_kl: float | None,
    seed: int | str | None,
    greedy: bool,
) -> FakeToken:
    guided = guidance is not None and guidance.scale != 1.0
    is_steered = bool(active) or guided
    key: list[Any] = [prompt, position, [[w.version, w.alpha] for w in active], None if greedy else seed]
    if guidance is not None and guided:
        key.append([guidance.token_ids, guidance.scale])
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    half = len(BASE_WORDS)
    index = digest[0] % half + (half if is_steered else 0)
    base = -0.1 - digest[1] / 64
    adapters = tuple(-0.1 - digest[2 + i] / 64 for i in range(len(active)))
    negative = -0.1 - digest[31] / 64 if guided else None
    moved = 0.25 * sum(w.alpha for w in active) + (0.25 * (guidance.scale - 1) if guidance is not None else 0.0)
    if max_kl is not None:
        moved = max(-max_kl, min(max_kl, moved))
    steered = min(-0.01, base + moved) if is_steered else base
    return FakeToken(FIRST_WORD_ID + index, WORDS[index], base, adapters, steered, negative, is_steered)


def render_chat(messages: Sequence[dict[str, Any]]) -> str:
    """A chat template: one line per message and the assistant's turn."""
    lines = [f"{m.get('role')}: {m.get('content') or ''}" for m in messages]
    return "\n".join([*lines, "assistant:"])


def kl_of(token: FakeToken) -> float:
    """A made-up but non-negative KL, 0 without steering."""
    return math.fabs(token.steered_logprob - token.base_logprob)
