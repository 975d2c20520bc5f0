"""Calls to a provider: retries with limits, what is billed, and what the caller is told when it fails."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import pytest
from typing_extensions import override

from fake_provider import FAST, FakeProvider, Reply, refusal, without_logprobs
from trimtab_adapters.contract.errors import (
    EngineDiedError,
    EngineError,
    EngineRequestError,
    EngineTimeoutError,
    EngineUnavailableError,
)
from trimtab_server.engine.black_box_answer import read_positions
from trimtab_server.engine.black_box_provider import Provider, ProviderLimits
from trimtab_server.engine.black_box_tokens import TokenMap
from trimtab_server.errors import error_answer

pytestmark = pytest.mark.anyio

BODY: dict[str, Any] = {"prompt": [3, 4, 5], "max_tokens": 1, "temperature": 1.0, "logprobs": 4}
SECRET = "sk-very-secret"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses between attempts are noted instead of waited for."""
    noted: list[float] = []
    sleep = asyncio.sleep

    async def note(delay: float, result: Any = None) -> Any:
        noted.append(delay)
        return await sleep(0, result)

    monkeypatch.setattr(asyncio, "sleep", note)
    return noted


async def ask(provider: Provider) -> Any:
    return await provider.complete(BODY, lambda data: data["choices"][0]["logprobs"]["tokens"])


async def test_what_is_billed_is_counted(anyio_backend: str) -> None:
    fake = FakeProvider()
    provider = fake.provider()
    tokens, cost = await ask(provider)
    assert len(tokens) == 1
    assert (cost.calls, cost.prompt_tokens, cost.completion_tokens, cost.cached_tokens) == (1, 3, 1, 1)
    assert fake.bodies == [{**BODY, "model": "big-model", "stream": False}]
    assert (provider.status.calls, provider.status.prompt_tokens, provider.status.retries) == (1, 3, 0)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
async def test_what_may_pass_is_tried_again(status: int) -> None:
    fake = FakeProvider(replies=[refusal(status), refusal(status)])
    provider = fake.provider()
    _, cost = await ask(provider)
    assert len(fake.bodies) == 3
    assert (cost.calls, provider.status.calls, provider.status.retries) == (1, 1, 2)


@pytest.mark.parametrize(
    "error", [httpx.ConnectError("x"), httpx.ReadTimeout("x"), httpx.RemoteProtocolError("x"), httpx.ReadError("x")]
)
async def test_a_broken_connection_is_tried_again(error: Exception) -> None:
    fake = FakeProvider(replies=[lambda _: error])
    await ask(fake.provider())
    assert len(fake.bodies) == 2


async def test_attempts_have_a_limit_and_the_caller_is_told_when_to_ask_again() -> None:
    fake = FakeProvider(replies=[refusal(503, headers={"Retry-After": "7"})] * 9)
    provider = fake.provider()
    with pytest.raises(EngineUnavailableError) as caught:
        await ask(provider)
    answer = error_answer(caught.value)
    assert (answer.status, answer.headers["Retry-After"]) == (503, "7")
    assert len(fake.bodies) == FAST.max_retries + 1
    assert provider.status.failed_calls == 1


@pytest.mark.parametrize(
    ("headers", "pause_s"),
    [
        ({"Retry-After": "3"}, 3.0),
        ({"retry-after-ms": "1500", "Retry-After": "2"}, 1.5),
        ({}, 14.0),
    ],
    ids=["seconds", "milliseconds", "date"],
)
async def test_the_provider_says_how_long_to_wait(
    no_pauses: list[float], headers: dict[str, str], pause_s: float
) -> None:
    """A date has whole seconds, so 15 s from now may be up to a second less."""
    headers = headers or {"Retry-After": format_datetime(datetime.now(UTC) + timedelta(seconds=15), usegmt=True)}
    await ask(FakeProvider(replies=[refusal(429, headers=headers)]).provider())
    assert max(no_pauses) == pytest.approx(pause_s, abs=1.01 if pause_s == 14.0 else 1e-6)


async def test_a_long_wait_is_left_to_the_caller(no_pauses: list[float]) -> None:
    fake = FakeProvider(replies=[refusal(429, headers={"Retry-After": "600"})])
    with pytest.raises(EngineUnavailableError) as caught:
        await ask(fake.provider())
    assert caught.value.retry_after_s == 600
    assert len(fake.bodies) == 1
    assert max(no_pauses, default=0) < 1


@pytest.mark.parametrize("value", ["", "soon", "-5", "nan", "inf"])
async def test_a_senseless_wait_is_none(no_pauses: list[float], value: str) -> None:
    await ask(FakeProvider(replies=[refusal(429, headers={"Retry-After": value})]).provider())
    assert 0 <= max(no_pauses) < 1


@pytest.mark.parametrize(
    ("reply", "status", "type_"),
    [
        (refusal(400, "the prompt is too long", param="prompt"), 400, "invalid_request_error"),
        (refusal(413), 413, "invalid_request_error"),
        (refusal(422), 422, "invalid_request_error"),
        (refusal(401, SECRET), 502, "server_error"),
        (refusal(403, SECRET), 502, "server_error"),
        (refusal(404, SECRET), 502, "server_error"),
        (lambda _: httpx.Response(302, headers={"Location": "http://elsewhere.test"}), 502, "server_error"),
    ],
)
async def test_a_refusal_is_not_tried_again(reply: Reply, status: int, type_: str) -> None:
    """What concerns the gateway's key, address or model is no fault of the caller, who does not see it."""
    fake = FakeProvider(replies=[reply])
    with pytest.raises(EngineRequestError) as caught:
        await ask(fake.provider())
    answer = error_answer(caught.value)
    assert (answer.status, answer.error["type"], len(fake.bodies)) == (status, type_, 1)
    assert SECRET not in str(answer.body)
    if status == 400:
        assert (answer.error["message"], answer.error["param"]) == ("the prompt is too long", "prompt")


async def test_an_empty_purse_is_not_tried_again() -> None:
    fake = FakeProvider(replies=[refusal(429, code="insufficient_quota")])
    with pytest.raises(EngineUnavailableError, match="quota"):
        await ask(fake.provider())
    assert len(fake.bodies) == 1


@pytest.mark.parametrize(
    "reply",
    [
        lambda _: httpx.Response(200, text="<html>"),
        lambda _: httpx.Response(200, json=[]),
        lambda _: httpx.Response(200, json={"choices": []}),
        lambda _: httpx.Response(200, json={"choices": [{"logprobs": {"tokens": 3}}], "usage": 5}),
    ],
    ids=["no JSON", "no object", "no choice", "odd usage"],
)
async def test_an_answer_of_another_form_is_an_error(reply: Reply) -> None:
    with pytest.raises(EngineError, match="unexpected form"):
        await ask(FakeProvider(replies=[reply]).provider())


TOKENS = TokenMap({i: f"t{i}".encode() for i in range(1, 128)}, {f"t{i}": i for i in range(128)})


async def test_an_answer_without_logprobs_is_asked_for_again_and_billed() -> None:
    fake = FakeProvider(replies=[without_logprobs])
    positions, cost = await fake.provider().complete(
        BODY, lambda data: read_positions(data, TOKENS, 4, reads_drawn=False)
    )
    assert len(positions) == 1
    assert (cost.calls, cost.prompt_tokens) == (2, 6)


async def test_answers_that_never_have_logprobs_are_an_error() -> None:
    fake = FakeProvider(replies=[without_logprobs] * 9)
    with pytest.raises(EngineError, match="top_logprobs"):
        await fake.provider().complete(BODY, lambda data: read_positions(data, TOKENS, 4, reads_drawn=False))
    assert len(fake.bodies) == FAST.max_retries + 1


async def test_a_call_has_a_deadline_over_all_attempts() -> None:
    async def hang(_: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError

    client = httpx.AsyncClient(transport=httpx.MockTransport(hang))
    provider = Provider("http://provider.test/v1", "m", client, ProviderLimits(deadline_s=0.05))
    started = time.monotonic()
    with pytest.raises(EngineTimeoutError):
        await ask(provider)
    assert time.monotonic() - started < 5


async def test_no_more_calls_at_a_time_than_allowed() -> None:
    running, most = 0, 0

    async def slow(request: httpx.Request) -> httpx.Response:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(20):
            await asyncio.sleep(0)
        running -= 1
        return httpx.Response(200, json=FakeProvider().answer(BODY))

    client = httpx.AsyncClient(transport=httpx.MockTransport(slow))
    provider = Provider("http://provider.test/v1", "m", client, ProviderLimits(max_calls=3))
    await asyncio.gather(*(ask(provider) for _ in range(12)))
    assert most == 3


async def test_a_stream_takes_a_place_to_its_end() -> None:
    provider = FakeProvider().provider(ProviderLimits(max_calls=1, deadline_s=0.2))
    stream = provider.stream({**BODY, "max_tokens": 3})
    await anext(stream)
    with pytest.raises(EngineTimeoutError):
        await ask(provider)
    await stream.aclose()
    await ask(provider)


async def test_checks_that_get_no_answer_count_too() -> None:
    async def away(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("x")

    client = httpx.AsyncClient(transport=httpx.MockTransport(away))
    provider = Provider("http://provider.test/v1", "m", client, ProviderLimits(breaker_threshold=2))
    for _ in range(2):
        with pytest.raises(EngineUnavailableError, match="cannot be reached"):
            await provider.check()
    assert provider.status.breaker == "open"


async def test_a_provider_that_is_away_is_left_alone_for_a_while() -> None:
    fake = FakeProvider(replies=[lambda _: httpx.ConnectError("x")] * 9)
    limits = ProviderLimits(max_retries=0, breaker_threshold=3, breaker_cooldown_s=60)
    provider = fake.provider(limits)
    for _ in range(3):
        with pytest.raises(EngineUnavailableError, match="cannot be reached"):
            await ask(provider)
    assert provider.status.breaker == "open"
    with pytest.raises(EngineUnavailableError, match="3 attempts in a row") as caught:
        await ask(provider)
    assert 1 <= caught.value.retry_after_s <= 61
    assert len(fake.bodies) == 3
    with pytest.raises(EngineUnavailableError):
        await provider.check()


async def test_being_too_busy_is_not_being_away() -> None:
    fake = FakeProvider(replies=[refusal(429)] * 5)
    provider = fake.provider(ProviderLimits(max_retries=0, breaker_threshold=2))
    for _ in range(5):
        with pytest.raises(EngineUnavailableError, match="too busy"):
            await ask(provider)
    assert provider.status.breaker == "closed"


async def test_whether_it_answers_is_asked_for_nothing_and_only_now_and_then() -> None:
    fake = FakeProvider()
    provider = fake.provider()
    await provider.check()
    await provider.check()
    assert fake.paths == ["/v1/models"]
    assert provider.status.calls == 0


@pytest.mark.parametrize(("status", "message"), [(401, "key"), (403, "key"), (503, "503")])
async def test_a_provider_that_refuses_the_key_or_is_down_is_unavailable(status: int, message: str) -> None:
    with pytest.raises(EngineUnavailableError, match=message):
        await FakeProvider(models_status=status).provider().check()


async def test_a_provider_that_does_not_list_models_is_there() -> None:
    await FakeProvider(models_status=404).provider().check()


async def test_a_failed_call_makes_the_next_check_ask() -> None:
    fake = FakeProvider(replies=[refusal(503)])
    provider = fake.provider(ProviderLimits(max_retries=0))
    await provider.check()
    with pytest.raises(EngineUnavailableError):
        await ask(provider)
    fake.models_status = 503
    with pytest.raises(EngineUnavailableError):
        await provider.check()


async def test_the_key_is_sent_and_in_no_log_and_no_message(caplog: pytest.LogCaptureFixture) -> None:
    fake = FakeProvider(replies=[refusal(401, "no"), refusal(503)])
    provider = fake.provider(ProviderLimits(max_retries=0), api_key=SECRET)
    messages = []
    with caplog.at_level(logging.DEBUG):
        for _ in range(2):
            with pytest.raises(EngineError) as caught:
                await ask(provider)
            messages.append(str(caught.value))
        await ask(provider)
    assert fake.headers["authorization"] == f"Bearer {SECRET}"
    assert SECRET not in caplog.text + "".join(messages) + provider.identity


async def chunks(provider: Provider) -> list[dict[str, Any]]:
    return [chunk async for chunk in provider.stream({**BODY, "max_tokens": 3})]


async def test_a_stream_is_tried_again_before_its_first_chunk_and_billed() -> None:
    fake = FakeProvider(replies=[refusal(503)])
    provider = fake.provider()
    assert [bool(chunk["choices"]) for chunk in await chunks(provider)] == [True, False]
    assert (provider.status.calls, provider.status.completion_tokens) == (1, 3)
    assert fake.bodies[-1]["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('data: {"choices": [{"text": "a"}]}\n\n', EngineDiedError),
        ('data: {"choices": []}\n\ndata: {"error": {"message": "boom"}}\n\n', EngineRequestError),
        ('data: {"choices": []}\n\ndata: {nonsense\n\n', EngineError),
    ],
    ids=["no end", "error", "no JSON"],
)
async def test_a_stream_that_breaks_off_is_an_error_and_not_begun_again(text: str, error: type[Exception]) -> None:
    headers = {"content-type": "text/event-stream"}
    fake = FakeProvider(replies=[lambda _: httpx.Response(200, text=text, headers=headers)])
    with pytest.raises(error):
        await chunks(fake.provider())
    assert len(fake.bodies) == 1


class Cut(httpx.AsyncByteStream):
    """A body whose connection breaks after the first chunk."""

    @override
    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b'data: {"choices": []}\n\n'
        raise httpx.ReadError("x")


async def test_a_connection_that_breaks_in_a_stream_is_an_error() -> None:
    response = httpx.Response(200, stream=Cut(), headers={"content-type": "text/event-stream"})
    with pytest.raises(EngineDiedError):
        await chunks(FakeProvider(replies=[lambda _: response]).provider())
