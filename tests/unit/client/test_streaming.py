"""The event-stream decoder: bytes in, JSON objects out."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab_client import APIResponseError, APIStatusError, BadRequestError, ServiceUnavailableError
from trimtab_client import StreamInterruptedError as Interrupted
from trimtab_client._streaming import ChunkDecoder, EventDecoder


def events(*chunks: bytes) -> list[str]:
    decoder = EventDecoder()
    return [event for chunk in chunks for event in decoder.feed(chunk)]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_an_event_ends_at_an_empty_line_with_any_line_end(end: bytes) -> None:
    body = b"data: a" + end + end + b"data: b" + end + end + b"data: c"
    # c has no empty line after it, so it is not an event yet
    assert events(body) == ["a", "b"]


@given(
    texts=st.lists(st.text(alphabet="ab \u2028\u0085\x0b\x0c\U0001f6a2é", max_size=6), min_size=1, max_size=4),
    end=st.sampled_from([b"\n", b"\r\n"]),
    cuts=st.lists(st.integers(min_value=0, max_value=120), max_size=6),
)
def test_where_the_bytes_are_cut_does_not_matter(texts: list[str], end: bytes, cuts: list[int]) -> None:
    body = b"".join(b"data: " + text.encode() + end + end for text in texts)
    edges = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    assert events(*(body[i:j] for i, j in pairwise(edges))) == texts


def test_comments_and_other_fields_are_no_events() -> None:
    assert events(b": keep-alive\n\nevent: x\nid: 7\nretry: 10\ndata: a\n\n") == ["a"]


def test_several_data_lines_make_one_event_joined_by_line_feeds() -> None:
    assert events(b"data: a\ndata:b\ndata:  c\n\n") == ["a\nb\n c"]


def test_a_crlf_that_is_cut_in_two_is_one_line_end() -> None:
    assert events(b"data: a\r", b"\ndata: b\r\n\r", b"\n") == ["a\nb"]


def test_nothing_after_the_closing_event_is_read() -> None:
    decoder = ChunkDecoder()
    assert list(decoder.feed(b'data: {"a": 1}\n\ndata: [DONE]\n\ndata: {"b": 2}\n\n')) == [{"a": 1}]
    assert list(decoder.feed(b'data: {"c": 3}\n\n')) == []
    decoder.close()


def test_an_end_without_the_closing_event_is_an_error() -> None:
    decoder = ChunkDecoder()
    assert list(decoder.feed(b'data: {"a": 1}\n\n')) == [{"a": 1}]
    with pytest.raises(Interrupted):
        decoder.close()


@pytest.mark.parametrize(
    ("error", "expected", "status"),
    [
        ('{"message": "m", "type": "server_error", "code": "engine_unavailable"}', ServiceUnavailableError, 503),
        ('{"message": "m", "type": "invalid_request_error", "param": "alpha"}', BadRequestError, 400),
        ('{"message": "m", "type": "BadRequestError", "code": 400}', BadRequestError, 400),
        ('{"message": "m", "type": "something new"}', APIStatusError, 500),
        ('"only text"', APIStatusError, 500),
    ],
)
def test_an_error_event_raises_the_class_of_its_status(error: str, expected: type[Exception], status: int) -> None:
    decoder = ChunkDecoder(request_id="r-1")
    with pytest.raises(APIStatusError) as caught:
        list(decoder.feed(f'data: {{"error": {error}}}\n\n'.encode()))
    assert isinstance(caught.value, expected)
    assert (caught.value.status_code, caught.value.request_id) == (status, "r-1")
    assert caught.value.message in ("m", "only text")


@pytest.mark.parametrize("data", [b"{half", b"[1]", b"7"])
def test_an_event_that_is_no_object_is_an_error(data: bytes) -> None:
    with pytest.raises(APIResponseError):
        list(ChunkDecoder().feed(b"data: " + data + b"\n\n"))
