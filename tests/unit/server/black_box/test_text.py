"""Text of tokens that come one by one, and stop strings across them."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from typing_extensions import override

from trimtab_adapters.contract.sampling import SamplingRules
from trimtab_server.engine.answer_text import AnswerText, Detokenizer, StopScanner, TextPiece
from trimtab_server.engine.sampling_request import SamplingRequest


class Utf8:
    """A tokenizer of bytes: id = byte; 256 is a special end, 257 another."""

    vocabulary: Mapping[str, int] = {}
    num_tokens = 258
    eos_token_ids = frozenset({256})

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        special = {256: b"<end>", 257: b"<pad>"}
        shown = b"" if skip_special_tokens else None
        parts = [bytes([i]) if i < 256 else (shown if shown is not None else special[i]) for i in token_ids]
        return b"".join(parts).decode(errors="replace")

    def render(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
        raise NotImplementedError

    def token_bytes(self) -> Mapping[int, bytes]:
        return {i: bytes([i]) for i in range(256)}


class Words(Utf8):
    """Words with a space between them, as SentencePiece and word-level tokenizers write them."""

    @override
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return " ".join(f"w{i}" for i in token_ids)


def asked(prompt: str = "p", **changes: Any) -> SamplingRequest:
    fields: dict[str, Any] = {
        "prompt_token_ids": list(prompt.encode()),
        "max_tokens": 100,
        "rules": SamplingRules(),
        "stops": (),
        "stop_is_included": False,
        "stop_token_ids": frozenset(),
        "ending_ids": frozenset({256}),
        "skip_special_tokens": True,
        "passed_on": None,
    }
    return SamplingRequest(**(fields | changes))


def pieces(request: SamplingRequest, token_ids: Sequence[int]) -> list[TextPiece]:
    text = AnswerText(Utf8(), request)
    return [text.push(token_id) for token_id in token_ids]


def shown(found: Sequence[TextPiece]) -> str:
    return "".join(piece.text for piece in found)


def test_a_character_comes_with_its_last_byte() -> None:
    found = pieces(asked(), "a€b".encode())
    assert [piece.text for piece in found] == ["a", "", "", "€", "b"]


def test_the_first_token_is_written_as_after_the_prompt() -> None:
    detokenizer = Detokenizer(Words(), [1, 2, 3], skip_special_tokens=True)
    assert [detokenizer.push(i) for i in (4, 5)] == [" w4", " w5"]


def test_bytes_that_are_no_character_come_at_the_end() -> None:
    found = pieces(asked(max_tokens=3), [97, 0xE2, 0x82])
    assert [piece.text for piece in found] == ["a", "", "\ufffd"]
    assert found[-1].finish_reason == "length"


def test_special_tokens_are_shown_where_asked_for() -> None:
    assert shown(pieces(asked(ending_ids=frozenset()), [97, 257, 98])) == "ab"
    assert shown(pieces(asked(ending_ids=frozenset(), skip_special_tokens=False), [97, 257, 98])) == "a<pad>b"


def test_the_end_of_the_model_says_no_reason_and_shows_nothing() -> None:
    assert pieces(asked(skip_special_tokens=False), [97, 256])[-1] == TextPiece("", "stop", None)


def test_a_stop_token_is_the_reason_and_shown_only_when_included() -> None:
    ends: dict[str, Any] = {"stop_token_ids": frozenset({98}), "ending_ids": frozenset({98, 256})}
    assert pieces(asked(**ends), b"ab")[-1] == TextPiece("", "stop", 98)
    assert pieces(asked(**ends, stop_is_included=True), b"ab")[-1] == TextPiece("b", "stop", 98)


def test_a_stop_string_across_tokens_ends_the_text_before_it() -> None:
    found = pieces(asked(stops=("END",)), b"abEND")
    assert [piece.text for piece in found] == ["a", "b", "", "", ""]
    assert found[-1] == TextPiece("", "stop", "END")


def test_an_included_stop_string_comes_whole() -> None:
    found = pieces(asked(stops=("END",), stop_is_included=True), b"abEND")
    assert shown(found) == "abEND"


def test_what_only_began_like_a_stop_string_is_shown_later() -> None:
    assert [piece.text for piece in pieces(asked(stops=("END",)), b"EXE")] == ["", "EX", ""]
    assert [piece.text for piece in pieces(asked(stops=("END",), max_tokens=3), b"EXE")] == ["", "EX", "E"]
    assert shown(pieces(asked(stops=("END",)), [*b"EN", 256])) == "EN"


def test_the_first_of_several_stop_strings_counts() -> None:
    scanner = StopScanner(["later", "ab"], is_included=False)
    assert scanner.push("xabylater") == ("x", "ab")


@pytest.mark.parametrize(("min_tokens", "text", "reason"), [(0, "a", "."), (2, "a.", "length"), (1, "a", ".")])
def test_stop_strings_wait_for_the_minimum(min_tokens: int, text: str, reason: str) -> None:
    """The text of the first `min_tokens` tokens is not searched."""
    found = pieces(asked(stops=(".",), max_tokens=2, rules=SamplingRules(min_tokens=min_tokens)), b"a.")
    assert shown(found) == text
    assert (found[-1].stop_reason or found[-1].finish_reason) == reason


def test_the_last_token_allowed_may_complete_a_stop_string() -> None:
    assert pieces(asked(stops=("b",), max_tokens=2), b"ab")[-1] == TextPiece("", "stop", "b")
