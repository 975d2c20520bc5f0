"""Which ids the token strings of an API mean, and which are refused."""

import math

import pytest

from trimtab_adapters.contract.errors import EngineError
from trimtab_server.engine.black_box_tokens import TokenMap

BYTES = {0: b"<eos>", 1: b" the", 2: b"the", 3: b"\xe2\x80", 4: b"\xe2\x82\xac", 5: b"a", 6: b"b"}
NAMES = {"<eos>": 0, "Ġthe": 1, "the": 2, "âĢ": 3, "âĤ¬": 4, "a": 5, "b": 6, "unused": 7}


@pytest.fixture
def tokens() -> TokenMap:
    return TokenMap(BYTES, NAMES)


@pytest.mark.parametrize(
    ("written", "token_id"),
    [
        (" the", 1),
        ("the", 2),
        ("€", 4),
        (r"bytes:\xe2\x80", 3),
        ("token_id:5", 5),
        ("token_id:99", None),
        ("Ġthe", 1),
        ("<eos>", 0),
        ("nowhere", None),
        ("\ufffd", None),
    ],
)
def test_a_token_is_found_by_its_id_its_bytes_or_its_name(tokens: TokenMap, written: str, token_id: int | None) -> None:
    assert tokens.id_of(written) == token_id


def test_a_string_that_may_be_several_tokens_is_refused() -> None:
    tokens = TokenMap(BYTES | {7: b"a"}, NAMES)
    with pytest.raises(EngineError, match=r"'a' may be any of the tokenizer's tokens \[5, 7\]"):
        tokens.map_top({"a": -0.1}, 5)


def test_the_sampled_token_beyond_the_top_k_is_left_out(tokens: TokenMap) -> None:
    """An API adds it to the k that it was asked for; what can be sampled must not depend on it."""
    shown = {"b": -9.0, "the": -0.5, "a": -1.5}
    assert tokens.map_top(shown, 2).top.token_ids == (2, 5)
    assert tokens.map_top(shown, 3).top.logprobs == (-0.5, -1.5, -9.0)


def test_unknown_tokens_are_left_out_and_counted(tokens: TokenMap) -> None:
    found = tokens.map_top({"the": math.log(0.6), "nowhere": math.log(0.3), "a": math.log(0.05)}, 3)
    assert found.top.token_ids == (2, 5)
    assert found.num_unmapped == 1


def test_two_strings_of_one_token_count_once(tokens: TokenMap) -> None:
    """As text and by name; the more probable one stands."""
    found = tokens.map_top({" the": -0.2, "Ġthe": -2.0}, 5)
    assert (found.top.token_ids, found.top.logprobs, found.num_unmapped) == ((1,), (-0.2,), 1)


def test_excluded_tokens_are_no_unknown_ones(tokens: TokenMap) -> None:
    found = tokens.map_top({"the": -0.1, "a": -9999.0, "b": -math.inf}, 5)
    assert (found.top.token_ids, found.num_unmapped) == ((2,), 0)


@pytest.mark.parametrize("known", [0.29, 0.0])
def test_another_models_tokenizer_is_noticed(tokens: TokenMap, known: float) -> None:
    """Less than half of the probability shown, 0.6, falls on known tokens."""
    shown = {"x1": 0.6 - known, "the": known} if known else {"x1": 0.3, "x2": 0.3}
    with pytest.raises(EngineError, match="--black-box-tokenizer"):
        tokens.map_top({token: math.log(probability) for token, probability in shown.items()}, 5)


def test_half_of_the_probability_is_enough(tokens: TokenMap) -> None:
    assert tokens.map_top({"x1": math.log(0.29), "the": math.log(0.31)}, 5).top.token_ids == (2,)
