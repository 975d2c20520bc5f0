"""Answers of a completions API, read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab_adapters.contract.sampling import SampledToken
from trimtab_server.engine.answer_text import TextPiece
from trimtab_server.engine.black_box_errors import NoLogprobsError
from trimtab_server.engine.black_box_tokens import MappedTop, TokenMap


@dataclass(frozen=True, slots=True)
class Position:
    """The base's next-token distribution at one place.

    Attributes:
        shown: Its most probable tokens.
        drawn: The token that the provider went on with; None where that does not matter.
    """

    shown: MappedTop
    drawn: int | None


def read_positions(data: Mapping[str, Any], tokens: TokenMap, num_top: int, *, reads_drawn: bool) -> list[Position]:
    """The distributions that one call shows, at least one.

    Args:
        data: The provider's answer to a request for one choice.
        tokens: Knows its token strings.
        num_top: k, as the provider was asked.
        reads_drawn: Whether there may be more than one, so that the provider's own tokens matter.

    Raises:
        NoLogprobsError: There are none.
        EngineError: They do not fit the tokenizer.
    """
    logprobs = data["choices"][0].get("logprobs") or {}
    tops = _array(logprobs.get("top_logprobs"))
    if not tops or not all(tops):
        raise NoLogprobsError
    drawn = [tokens.id_of(token) for token in logprobs["tokens"]] if reads_drawn else [None] * len(tops)
    return [Position(tokens.map_top(top, num_top), token_id) for top, token_id in zip(tops, drawn, strict=True)]


@dataclass(frozen=True, slots=True)
class WholePiece:
    """A piece of an answer that the provider sampled by itself."""

    text: TextPiece
    tokens: Sequence[SampledToken]


def read_piece(choice: Mapping[str, Any], tokens: TokenMap, num_top: int) -> WholePiece:
    """A choice of an answer or of a chunk.

    Raises:
        EngineError: A token is not in the tokenizer, so the answer could not be logged.
        ValueError: Log-probabilities are missing.
    """
    logprobs = choice.get("logprobs") or {}
    sampled = []
    names, values = _array(logprobs.get("tokens")), _array(logprobs.get("token_logprobs"))
    tops = logprobs.get("top_logprobs") or [None] * len(names)
    for name, logprob, top in zip(names, values, tops, strict=True):
        token_id = tokens.id_of(name)
        if token_id is None or logprob is None:
            raise ValueError(f"the token {name!r} is not in the tokenizer, or has no log-probability")
        ranked = sorted((top or {}).items(), key=lambda item: -item[1])[:num_top]
        known = [(tokens.id_of(shown), float(value)) for shown, value in ranked]
        sampled.append(SampledToken(token_id, float(logprob), [(i, value) for i, value in known if i is not None]))
    text = str(choice.get("text") or "")
    if text and not sampled:
        raise ValueError("text without log-probabilities")
    return WholePiece(TextPiece(text, choice.get("finish_reason"), choice.get("stop_reason")), sampled)


def _array(value: object) -> Sequence[Any]:
    """A JSON array; empty for null."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise TypeError(f"an array was expected, not {type(value).__name__}")
    return value
