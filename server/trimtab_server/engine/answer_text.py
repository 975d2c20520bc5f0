"""The text of an answer that comes token by token: characters across tokens, and stop strings across pieces."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from trimtab_server.engine.sampling_request import SamplingRequest

_PARTIAL = "\ufffd"
_NUM_CONTEXT = 8
"""Prompt tokens before the answer that may change how its first token is written, such as by a space before it."""


class Tokenizer(Protocol):
    """The base's tokenizer; the real one is `trimtab_adapters.in_process.tokenizer.BaseTokenizer`."""

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """Token -> id."""
        ...

    @property
    def num_tokens(self) -> int:
        """Largest id + 1."""
        ...

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end an answer by themselves."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        ...

    def render(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
        """Messages as the chat template writes them. Raises `InvalidRequestError` where it cannot."""
        ...

    def token_bytes(self) -> Mapping[int, bytes]:
        """Bytes of each token."""
        ...


class Detokenizer:
    """Text of one token after the other. What ends inside a character waits for its other bytes.

    Args:
        tokenizer: The base's.
        prompt_token_ids: The prompt.
        skip_special_tokens: Whether special tokens are left out of the text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids = list(prompt_token_ids[-_NUM_CONTEXT:])
        self._start = 0
        self._read = len(self._ids)

    def push(self, token_id: int) -> str:
        """What this token adds."""
        self._ids.append(token_id)
        before, now = self._decode(slice(self._start, self._read)), self._decode(slice(self._start, None))
        if now.endswith(_PARTIAL) or len(now) <= len(before):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def flush(self) -> str:
        """What was waiting for bytes that do not come."""
        before, now = self._decode(slice(self._start, self._read)), self._decode(slice(self._start, None))
        self._start = self._read = len(self._ids)
        return now[len(before) :]

    def _decode(self, part: slice) -> str:
        return self._tokenizer.decode(self._ids[part], skip_special_tokens=self._skip)


class StopScanner:
    """Finds stop strings in a text that grows, and keeps back an end that may be the beginning of one.

    Args:
        stops: The stop strings.
        is_included: Whether the stop string belongs to the text.
    """

    def __init__(self, stops: Sequence[str], *, is_included: bool) -> None:
        self._stops = [stop for stop in stops if stop]
        self._is_included = is_included
        self._held = ""

    def push(self, piece: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """What can be shown now, and the stop string that ended the text, if one did.

        Args:
            piece: The new text.
            may_stop: False while the answer is shorter than its minimum: such text is shown whole and never searched.
        """
        text = self._held + piece
        if not may_stop:
            self._held = ""
            return text, None
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, stop = min(found)
            self._held = ""
            return text[: at + len(stop)] if self._is_included else text[:at], stop
        num_held = max((n for s in self._stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        shown = len(text) - num_held
        self._held = text[shown:]
        return text[:shown], None

    def flush(self) -> str:
        """What was kept back."""
        held, self._held = self._held, ""
        return held


@dataclass(frozen=True, slots=True)
class TextPiece:
    """What a token adds to the text, and whether and why the answer ends with it (`stop_reason` as vLLM has it)."""

    text: str
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class AnswerText:
    """Text and end of one answer.

    Args:
        tokenizer: The base's.
        request: What was asked for.
    """

    def __init__(self, tokenizer: Tokenizer, request: "SamplingRequest") -> None:
        self._request = request
        self._eos_token_ids = tokenizer.eos_token_ids
        self._tokens = Detokenizer(tokenizer, request.prompt_token_ids, skip_special_tokens=request.skip_special_tokens)
        self._stops = StopScanner(request.stops, is_included=request.stop_is_included)
        self._num_tokens = 0

    def push(self, token_id: int) -> TextPiece:
        """Take the next token in."""
        request = self._request
        self._num_tokens += 1
        if token_id in request.ending_ids:
            is_shown = request.stop_is_included and token_id in request.stop_token_ids
            last = self._tokens.push(token_id) if is_shown else ""
            reason = token_id if token_id not in self._eos_token_ids else None
            return TextPiece(self._stops.flush() + last + self._tokens.flush(), "stop", reason)
        may_stop = self._num_tokens > request.rules.min_tokens
        text, stop = self._stops.push(self._tokens.push(token_id), may_stop=may_stop)
        if stop is None and self._num_tokens >= request.max_tokens:
            more, stop = self._stops.push(self._tokens.flush(), may_stop=may_stop)
            text += more
            if stop is None:
                return TextPiece(text + self._stops.flush(), "length")
        return TextPiece(text, None if stop is None else "stop", stop)
