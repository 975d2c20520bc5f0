"""Requests, answers, errors, retries and streams of both clients, over canned answers."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from typing_extensions import override

import trimtab_client as trimtab
from trimtab_client import AsyncClient, Client
from trimtab_client._base import retry_after_s
from trimtab_client._errors import STATUS_CLASSES

Answer = httpx.Response | Exception

COMPLETION = {
    "id": "cmpl-1",
    "object": "text_completion",
    "created": 5,
    "model": "kind",
    "choices": [
        {
            "index": 0,
            "text": " bread",
            "finish_reason": "length",
            "logprobs": None,
            "selection": {
                "rank": 0,
                "num_candidates": 8,
                "mean_logprob": -1.5,
                "reward": {"name": "kindness", "version": "1", "raw": 0.25, "calibrated": 0.875},
            },
            "token_ids": [7],
        }
    ],
    "usage": {"prompt_tokens": 3, "completion_tokens": 8, "total_tokens": 11},
}


@dataclass
class CannedGateway:
    """Gives its answers in turn, the last one for ever, and keeps the requests."""

    answers: list[Answer] = field(default_factory=list)
    requests: list[httpx.Request] = field(default_factory=list)

    def respond(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def respond_later(self, request: httpx.Request) -> httpx.Response:
        return self.respond(request)

    @property
    def body(self) -> Any:
        return json.loads(self.requests[-1].content)

    def client(self, **options: Any) -> Client:
        return Client(transport=httpx.MockTransport(self.respond), **options)

    def async_client(self, **options: Any) -> AsyncClient:
        return AsyncClient(transport=httpx.MockTransport(self.respond_later), **options)


@pytest.fixture
def gateway() -> CannedGateway:
    return CannedGateway()


@pytest.fixture
def delays(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits between attempts, recorded instead of waited for."""
    waited: list[float] = []

    async def record(delay_s: float) -> None:
        waited.append(delay_s)

    monkeypatch.setattr("trimtab_client._caller.time.sleep", waited.append)
    monkeypatch.setattr("trimtab_client._caller.anyio.sleep", record)
    return waited


def ok(body: object) -> httpx.Response:
    return httpx.Response(200, json=body)


def failure(status: int, headers: dict[str, str] | None = None, **error: Any) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": "no", **error}}, headers=headers)


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    return anyio.run(work)


def sse(*objects: object, done: bool = True) -> httpx.Response:
    events = [f"data: {json.dumps(item)}\n\n" for item in objects] + (["data: [DONE]\n\n"] if done else [])
    return httpx.Response(200, content="".join(events).encode(), headers={"x-request-id": "r-9"})


# Requests and answers.


def test_a_completion_is_sent_and_read(gateway: CannedGateway) -> None:
    gateway.answers = [ok(COMPLETION)]
    with gateway.client(base_url="http://gateway:8000/", api_key="k", admin_key="a") as client:
        completion = client.completions.create(
            model="kind", prompt="The baker", best_of=8, steering={"adapters": [{"name": "kind", "alpha": 0.5}]}
        )
    request = gateway.requests[0]
    assert (request.method, str(request.url)) == ("POST", "http://gateway:8000/v1/completions")
    assert request.headers["authorization"] == "Bearer k"
    assert gateway.body == {
        "model": "kind",
        "prompt": "The baker",
        "best_of": 8,
        "steering": {"adapters": [{"name": "kind", "alpha": 0.5}]},
    }
    choice = completion.choices[0]
    assert (choice.text, choice.finish_reason, choice.extra) == (" bread", "length", {"token_ids": [7]})
    assert choice.selection is not None
    assert choice.selection.reward is not None
    assert (choice.selection.num_candidates, choice.selection.reward.calibrated) == (8, 0.875)
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 8


def test_the_async_client_sends_the_same(gateway: CannedGateway) -> None:
    gateway.answers = [ok(COMPLETION)]

    async def create() -> trimtab.types.Completion:
        async with gateway.async_client() as client:
            return await client.completions.create(model="kind", prompt=[1, 2], extra_body={"guided": True})

    assert run(create).choices[0].text == " bread"
    assert gateway.body == {"model": "kind", "prompt": [1, 2], "guided": True}
    assert "authorization" not in gateway.requests[0].headers


def test_a_chat_message_is_read(gateway: CannedGateway) -> None:
    message = {"role": "assistant", "content": "Hello"}
    gateway.answers = [ok({"id": "c", "model": "m", "choices": [{"index": 0, "message": message}]})]
    with gateway.client() as client:
        chat = client.chat.create(model="m", messages=[{"role": "user", "content": "Hi"}], max_completion_tokens=4)
    assert chat.choices[0].message.content == "Hello"
    assert gateway.body["messages"] == [{"role": "user", "content": "Hi"}]


def test_names_are_quoted_in_paths(gateway: CannedGateway) -> None:
    gateway.answers = [ok({"id": "team/kind model"})]
    with gateway.client() as client:
        assert client.models.get("team/kind model").id == "team/kind model"
    assert gateway.requests[0].url.raw_path == b"/v1/models/team%2Fkind%20model"


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"id": "x"}', b'{"id": "x", "model": "m", "choices": [1]}'])
def test_an_answer_of_another_shape_is_an_error(gateway: CannedGateway, body: bytes) -> None:
    gateway.answers = [httpx.Response(200, content=body)]
    with gateway.client() as client, pytest.raises(trimtab.APIResponseError):
        client.completions.create(model="m", prompt="p")


def test_a_base_url_without_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="http://"):
        Client("gateway:8000")


# The admin API.


def test_admin_calls_carry_the_admin_key(gateway: CannedGateway) -> None:
    gateway.answers = [ok({"data": []})]
    with gateway.client(api_key="k", admin_key="a") as client:
        assert client.admin.adapters.list() == []
    assert gateway.requests[0].headers["authorization"] == "Bearer a"


@pytest.mark.parametrize(
    ("call", "method", "path", "body"),
    [
        (
            lambda admin: admin.adapters.add(name="kind", path="/a", prefix_token_ids=(1, 2), route="r"),
            "POST",
            "/admin/adapters",
            {"name": "kind", "path": "/a", "prefix_token_ids": [1, 2], "route": "r"},
        ),
        (
            lambda admin: admin.adapters.add(name="kind", path="/lora", trunk="/small-lm"),
            "POST",
            "/admin/adapters",
            {"name": "kind", "path": "/lora", "trunk": "/small-lm"},
        ),
        (
            lambda admin: admin.adapters.retire(name="kind", version="00ff"),
            "POST",
            "/admin/adapters/kind/versions/00ff/retire",
            None,
        ),
        (
            lambda admin: admin.adapters.pin(name="kind", version="00ff"),
            "PUT",
            "/admin/adapters/kind/versions/00ff/pin",
            {},
        ),
        (
            lambda admin: admin.adapters.activate(route="r", adapter="kind", alpha=0.0),
            "POST",
            "/admin/routes/r/activate",
            {"adapter": "kind", "alpha": 0.0},
        ),
        (lambda admin: admin.adapters.rollback(route="r"), "POST", "/admin/routes/r/rollback", {}),
        (
            lambda admin: admin.adapters.rollback(route="r", revision=3),
            "POST",
            "/admin/routes/r/rollback",
            {"revision": 3},
        ),
        (lambda admin: admin.routes.get("r"), "GET", "/admin/routes/r", None),
        (lambda admin: admin.routes.delete("r"), "DELETE", "/admin/routes/r", None),
        (lambda admin: admin.training_jobs.get("j"), "GET", "/admin/training-jobs/j", None),
        (lambda admin: admin.rewards.get("w"), "GET", "/admin/rewards/w", None),
        (lambda admin: admin.rewards.delete("w"), "DELETE", "/admin/rewards/w", None),
        (
            lambda admin: admin.rewards.add(name="w", kind="sentiment", options={"value": "pos"}),
            "POST",
            "/admin/rewards",
            {"name": "w", "kind": "sentiment", "target": "", "options": {"value": "pos"}},
        ),
        (
            lambda admin: admin.rewards.score("w", [{"prompt": "p", "output": "o"}]),
            "POST",
            "/admin/rewards/w/score",
            ...,
        ),
    ],
)
def test_admin_calls_meet_their_routes(
    gateway: CannedGateway, call: Callable[[Any], object], method: str, path: str, body: Any
) -> None:
    answer = {"name": "x", "version": "v", "route": "r", "revision": 1, "id": "j", "state": "queued", "rewards": [0.5]}
    gateway.answers = [ok(answer)]
    with gateway.client() as client:
        call(client.admin)
    request = gateway.requests[0]
    assert (request.method, request.url.path) == (method, path)
    if body is not ...:
        assert (json.loads(request.content) if request.content else None) == body


def test_an_export_appears_only_when_complete(gateway: CannedGateway, tmp_path: Path) -> None:
    gateway.answers = [httpx.Response(200, content=b'{"id": 1}\n')]
    with gateway.client() as client:
        size = client.admin.rollouts.export(tmp_path / "log.jsonl", route="r", chosen_only=True)
    assert (size, (tmp_path / "log.jsonl").read_bytes()) == (10, b'{"id": 1}\n')
    assert dict(gateway.requests[0].url.params) == {"format": "jsonl", "route": "r", "chosen_only": "true"}


def test_a_broken_export_leaves_nothing_behind(gateway: CannedGateway, tmp_path: Path) -> None:
    def breaking() -> Iterator[bytes]:
        yield b"half"
        raise httpx.ReadError("reset")

    gateway.answers = [httpx.Response(200, content=breaking())]
    (tmp_path / "log.jsonl").write_text("old")
    with gateway.client() as client, pytest.raises(trimtab.APIConnectionError):
        client.admin.rollouts.export(tmp_path / "log.jsonl")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("log.jsonl", "old")]


# Errors.


@pytest.mark.parametrize(("status", "expected"), [*STATUS_CLASSES.items(), (500, trimtab.InternalServerError)])
def test_each_status_has_its_class(gateway: CannedGateway, status: int, expected: type[trimtab.APIStatusError]) -> None:
    gateway.answers = [failure(status, {"x-request-id": "r-1"}, type="t", param="alpha", code="c")]
    with gateway.client(max_retries=0) as client, pytest.raises(trimtab.APIStatusError) as caught:
        client.completions.create(model="m", prompt="p")
    error = caught.value
    assert type(error) is expected
    assert (error.status_code, error.message, error.type, error.param) == (status, "no", "t", "alpha")
    assert (error.code, error.request_id) == ("c", "r-1")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"Bad Gateway", "Bad Gateway"),
        (b"", "HTTP status 502"),
        (b'{"detail": "why"}', "why"),
        (b"[1]", "HTTP status 502"),
    ],
)
def test_an_error_of_a_proxy_is_read_as_far_as_it_goes(gateway: CannedGateway, content: bytes, message: str) -> None:
    gateway.answers = [httpx.Response(502, content=content)]
    with gateway.client() as client, pytest.raises(trimtab.BadGatewayError) as caught:
        client.models.list()
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(httpx.ReadTimeout("t"), trimtab.APITimeoutError), (httpx.ReadError("r"), trimtab.APIConnectionError)],
)
def test_connection_errors_are_translated(gateway: CannedGateway, raised: Exception, expected: type[Exception]) -> None:
    gateway.answers = [raised]
    with gateway.client(max_retries=0) as client, pytest.raises(expected) as caught:
        client.models.list()
    assert caught.value.__cause__ is raised


# Retries.


def test_a_refused_request_is_repeated_after_the_time_the_gateway_names(
    gateway: CannedGateway, delays: list[float]
) -> None:
    gateway.answers = [failure(503, {"retry-after": "7"}), failure(429, {"retry-after": "3"}), ok(COMPLETION)]
    with gateway.client() as client:
        assert client.completions.create(model="m", prompt="p").id == "cmpl-1"
    assert delays == [7.0, 3.0]
    assert {request.content for request in gateway.requests} == {b'{"model":"m","prompt":"p"}'}


def test_the_async_client_repeats_too(gateway: CannedGateway, delays: list[float]) -> None:
    gateway.answers = [httpx.ConnectError("refused"), failure(503), ok({"data": [{"id": "m"}]})]

    async def models() -> list[trimtab.types.Model]:
        async with gateway.async_client() as client:
            return await client.models.list()

    assert [model.id for model in run(models)] == ["m"]
    # without Retry-After: 0.5 s and 1 s, each shortened by at most a quarter
    assert 0.375 <= delays[0] <= 0.5
    assert 0.75 <= delays[1] <= 1.0


def test_retries_end(gateway: CannedGateway, delays: list[float]) -> None:
    gateway.answers = [failure(503, {"retry-after": "1"})]
    with gateway.client(max_retries=3) as client, pytest.raises(trimtab.ServiceUnavailableError) as caught:
        client.models.list()
    assert (delays, len(gateway.requests)) == ([1.0, 1.0, 1.0], 4)
    assert caught.value.retry_after_s == 1.0


def test_a_gateway_that_asks_for_an_hour_is_not_waited_for(gateway: CannedGateway, delays: list[float]) -> None:
    gateway.answers = [failure(429, {"retry-after": "3600"})]
    with gateway.client() as client, pytest.raises(trimtab.RateLimitError) as caught:
        client.models.list()
    assert (delays, caught.value.retry_after_s) == ([], 3600.0)


@pytest.mark.parametrize("status", [400, 401, 404, 409, 500, 502])
def test_other_errors_are_final(gateway: CannedGateway, delays: list[float], status: int) -> None:
    gateway.answers = [failure(status)]
    with gateway.client() as client, pytest.raises(trimtab.APIStatusError):
        client.models.list()
    assert (delays, len(gateway.requests)) == ([], 1)


def test_a_post_that_may_have_arrived_is_not_repeated(gateway: CannedGateway, delays: list[float]) -> None:
    gateway.answers = [httpx.ReadError("reset")]
    with gateway.client() as client:
        with pytest.raises(trimtab.APIConnectionError):
            client.completions.create(model="m", prompt="p")
        assert len(gateway.requests) == 1
        with pytest.raises(trimtab.APIConnectionError):
            client.models.list()
    assert len(gateway.requests) == 1 + 3
    assert len(delays) == 2


@pytest.mark.parametrize(
    ("header", "expected"),
    [("2.5", 2.5), ("-3", 0.0), ("soon", None), ("", None), ("nan", None), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0)],
)
def test_retry_after_is_a_number_or_a_date(header: str, expected: float | None) -> None:
    assert retry_after_s({"retry-after": header}) == expected


# Streams.


def chunk(text: str) -> dict[str, object]:
    return {"id": "c", "model": "m", "choices": [{"index": 0, "text": text}]}


def test_a_stream_yields_chunks_and_then_the_usage(gateway: CannedGateway) -> None:
    gateway.answers = [
        sse(chunk("a"), chunk("b"), {"id": "c", "model": "m", "choices": [], "usage": {"total_tokens": 5}})
    ]
    with gateway.client() as client, client.completions.stream(model="m", prompt="p") as chunks:
        received = list(chunks)
        assert chunks.request_id == "r-9"
    assert "".join(c.choices[0].text for c in received if c.choices) == "ab"
    assert received[-1].usage is not None
    assert received[-1].usage.total_tokens == 5
    assert gateway.body == {"model": "m", "prompt": "p", "stream": True, "stream_options": {"include_usage": True}}


def test_an_async_stream_yields_the_same(gateway: CannedGateway) -> None:
    delta = {"id": "c", "model": "m", "choices": [{"index": 0, "delta": {"content": "a"}}]}
    gateway.answers = [sse(delta, delta)]

    async def texts() -> list[str | None]:
        async with gateway.async_client() as client, client.chat.stream(model="m", messages=[]) as chunks:
            return [c.choices[0].delta.content async for c in chunks]

    assert run(texts) == ["a", "a"]


def test_a_stream_is_opened_with_retries(gateway: CannedGateway, delays: list[float]) -> None:
    gateway.answers = [failure(503, {"retry-after": "2"}), sse(chunk("a"))]
    with gateway.client() as client, client.completions.stream(model="m", prompt="p") as chunks:
        assert len(list(chunks)) == 1
    assert delays == [2.0]


def test_an_error_event_raises_after_the_chunks_before_it(gateway: CannedGateway) -> None:
    error = {"error": {"message": "gone", "type": "server_error", "code": "engine_died"}}
    gateway.answers = [sse(chunk("a"), error, done=False)]
    with gateway.client() as client, client.completions.stream(model="m", prompt="p") as chunks:
        iterator = iter(chunks)
        assert next(iterator).choices[0].text == "a"
        with pytest.raises(trimtab.ServiceUnavailableError, match="gone") as caught:
            next(iterator)
    assert caught.value.request_id == "r-9"


def test_a_stream_that_ends_early_is_not_taken_for_a_whole_one(gateway: CannedGateway) -> None:
    gateway.answers = [sse(chunk("a"), done=False)]
    with gateway.client() as client, client.completions.stream(model="m", prompt="p") as chunks:
        iterator = iter(chunks)
        assert next(iterator).choices[0].text == "a"
        with pytest.raises(trimtab.StreamInterruptedError):
            next(iterator)


class EndlessBody(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A stream that goes on until its reader closes it."""

    def __init__(self) -> None:
        self.is_closed = False
        self._event = f"data: {json.dumps(chunk('a'))}\n\n".encode()

    @override
    def __iter__(self) -> Iterator[bytes]:
        while True:
            yield self._event

    @override
    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            yield self._event

    @override
    def close(self) -> None:
        self.is_closed = True

    @override
    async def aclose(self) -> None:
        self.is_closed = True


def test_leaving_a_stream_early_closes_its_connection(gateway: CannedGateway) -> None:
    body = EndlessBody()
    gateway.answers = [httpx.Response(200, stream=body)]
    with gateway.client() as client, client.completions.stream(model="m", prompt="p") as chunks:
        assert next(iter(chunks)).choices[0].text == "a"
        assert not body.is_closed
    assert body.is_closed


def test_leaving_an_async_stream_early_closes_its_connection(gateway: CannedGateway) -> None:
    body = EndlessBody()
    gateway.answers = [httpx.Response(200, stream=body)]

    async def leave_early() -> None:
        async with gateway.async_client() as client, client.completions.stream(model="m", prompt="p") as chunks:
            async for _ in chunks:
                break
            assert not body.is_closed

    run(leave_early)
    assert body.is_closed


def test_a_stream_must_be_opened_before_it_is_read(gateway: CannedGateway) -> None:
    with gateway.client() as client, pytest.raises(RuntimeError, match="with"):
        list(client.completions.stream(model="m", prompt="p"))
