"""The pieces of a streamed answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimtab_server.decoding.candidates import Selection
from trimtab_server.decoding.job import PromptResult
from trimtab_server.engine.base import Candidate, EngineDelta


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """A piece of one choice of a streamed answer.

    Attributes:
        index: Of the choice in the answer.
        prompt_index: Of its prompt.
        delta: The engine's piece.
        is_first: Whether it is the first piece of its choice.
        is_last: Whether it is the last piece of the whole answer.
        num_tokens: Tokens of this choice up to here.
        num_prompt_tokens: Tokens of its prompt.
        explanation: Of the tokens of the piece, where it was asked for.
        candidate: Complete, on the piece that ends its choice.
        selection: How the choice was chosen, on the piece that ends it, where choices are chosen.
        prompt: What came of its prompt, with it.
    """

    index: int
    prompt_index: int
    delta: EngineDelta
    is_first: bool
    is_last: bool
    num_tokens: int
    num_prompt_tokens: int
    explanation: dict[str, Any] | None
    candidate: Candidate | None
    selection: Selection | None = None
    prompt: PromptResult | None = None


def in_order(candidates: Sequence[Candidate]) -> PromptResult:
    """Candidates as they were asked for, unranked."""
    return PromptResult([Selection(c, None, i, len(candidates)) for i, c in enumerate(candidates)])
