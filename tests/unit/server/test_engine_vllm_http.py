"""`VllmEngine` against an application that speaks vLLM's protocol, over a real socket."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import httpx
import pytest

from fake_gateway import KIND, serving
from trimtab_adapters.contract.errors import (
    AdapterError,
    AdapterMemoryFullError,
    AdapterTooLargeError,
    EngineDiedError,
    EngineError,
    EngineRequestError,
    EngineUnavailableError,
    SteeringError,
    VocabularyError,
    WeightsError,
)
from trimtab_adapters.contract.params import AdapterWeight, SteeringParams
from trimtab_adapters.contract.records import Alternative, Alternatives, SteeringRecord
from trimtab_server.engine.base import Endpoint, EngineRequest
from trimtab_server.engine.candidate_builder import CandidateBuilder
from trimtab_server.engine.fake import FakeEngine, Fault
from trimtab_server.engine.fake_app import fake_vllm_app
from trimtab_server.engine.record_fetcher import MAX_UIDS, RecordFetcher
from trimtab_server.engine.vllm_http import DEAD_ENGINE, VllmEngine, build_engine_client

pytestmark = pytest.mark.anyio

BODY: dict[str, Any] = {"prompt": "Hi", "max_tokens": 4, "logprobs": 0, "return_token_ids": True}
CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Hi"}],
    "max_tokens": 4,
    "logprobs": True,
    "return_token_ids": True,
}


def request(
    body: dict[str, Any] | None = None, *, endpoint: Endpoint = "completions", uid: str = "u-0"
) -> EngineRequest:
    return EngineRequest(endpoint, BODY if body is None else body, None, uid)


def steered(uid: str = "u-0", *, record: bool = True) -> EngineRequest:
    weights = [AdapterWeight(name="kind", version=KIND, alpha=1.0)]
    return EngineRequest("completions", BODY, SteeringParams(uid=uid, adapters=weights, record=record), uid)


@pytest.fixture
def fake() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def engine(anyio_backend: str, fake: FakeEngine) -> AsyncIterator[VllmEngine]:
    async with serving(fake_vllm_app(fake)) as url:
        engine = VllmEngine(url, "engine", build_engine_client())
        yield engine
        await engine.aclose()


def scripted(handler: Callable[[httpx.Request], httpx.Response]) -> VllmEngine:
    return VllmEngine("http://engine", "engine", httpx.AsyncClient(transport=httpx.MockTransport(handler)))


def sse(*events: str) -> httpx.Response:
    text = "".join(f"data: {event}\n\n" for event in events)
    return httpx.Response(200, headers={"content-type": "text/event-stream"}, text=text)


@pytest.mark.parametrize(("endpoint", "body"), [("completions", BODY), ("chat.completions", CHAT)])
async def test_a_streamed_candidate_equals_the_whole_one(
    engine: VllmEngine, fake: FakeEngine, endpoint: Endpoint, body: dict[str, Any]
) -> None:
    whole = await engine.generate(request(body, endpoint=endpoint))
    builder = CandidateBuilder(request(body, endpoint=endpoint), "engine")
    async for delta in engine.stream(request(body, endpoint=endpoint)):
        builder.add(delta)
    streamed = builder.candidate()
    for name in ("text", "prompt_token_ids", "token_ids", "token_logprobs", "finish_reason", "usage"):
        assert getattr(streamed, name) == getattr(whole, name), name
    direct = await fake.generate(request(body, endpoint=endpoint))
    assert (whole.text, whole.token_logprobs) == (direct.text, direct.token_logprobs)
    assert whole.engine == "engine"


async def test_steering_and_the_callers_own_xargs_travel_together(engine: VllmEngine, fake: FakeEngine) -> None:
    seen: list[dict[str, Any]] = []

    def handler(sent: httpx.Request) -> httpx.Response:
        seen.append(json.loads(sent.content))
        return httpx.Response(400, json={"error": {"message": "enough"}})

    wanted = steered()
    with pytest.raises(EngineRequestError):
        await scripted(handler).generate(
            EngineRequest("completions", {**BODY, "vllm_xargs": {"other": 1}}, wanted.steering, "u-0")
        )
    (body,) = seen
    assert body["vllm_xargs"]["other"] == 1
    assert SteeringParams.from_extra_args(body["vllm_xargs"]) == wanted.steering
    assert (body["n"], body["stream"]) == (1, False)
    assert "model" not in body


async def test_echo_gives_only_the_generated_ids_and_logprobs(engine: VllmEngine) -> None:
    plain = await engine.generate(request())
    echoed = await engine.generate(request({**BODY, "echo": True}))
    assert (echoed.token_ids, echoed.token_logprobs) == (plain.token_ids, plain.token_logprobs)
    assert len(echoed.choice["logprobs"]["tokens"]) == 2 + 4
    nothing = await engine.generate(request({**BODY, "echo": True, "max_tokens": 0}))
    assert (nothing.token_ids, nothing.usage["completion_tokens"]) == ([], 0)


@pytest.mark.parametrize("endpoint", ["completions", "chat.completions"])
async def test_a_group_is_one_request_and_equals_its_members_alone(
    engine: VllmEngine, fake: FakeEngine, endpoint: Endpoint
) -> None:
    body = BODY if endpoint == "completions" else CHAT
    members = [EngineRequest(endpoint, {**body, "seed": 7 + i}, None, f"r-{i}") for i in range(3)]
    together = await engine.generate_group(members)
    alone = [await engine.generate(member) for member in members]
    for grouped, single in zip(together, alone, strict=True):
        assert (grouped.text, grouped.token_ids, grouped.token_logprobs) == (
            single.text,
            single.token_ids,
            single.token_logprobs,
        )
        assert (grouped.usage, grouped.prompt_token_ids) == (single.usage, single.prompt_token_ids)
    assert len({candidate.text for candidate in together}) == 3


async def test_a_group_that_lacks_a_member_is_an_error() -> None:
    choice = {
        "index": 0,
        "text": "a",
        "finish_reason": "stop",
        "token_ids": [1],
        "logprobs": {"token_logprobs": [-1.0]},
    }
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    sent: list[dict[str, Any]] = []

    def handler(received: httpx.Request) -> httpx.Response:
        sent.append(json.loads(received.content))
        return httpx.Response(200, json={"choices": [choice], "usage": usage})

    with pytest.raises(EngineError, match="1 of 2 candidates"):
        await scripted(handler).generate_group([request(uid="r-0"), request(uid="r-1")])
    assert [body["n"] for body in sent] == [2]


async def test_the_hidden_token_of_max_tokens_zero_is_not_counted() -> None:
    # vLLM samples one token for `echo` with max_tokens 0, counts it and sends its id
    logprobs = {"tokens": ["H", "i"], "token_logprobs": [None, -1.0], "top_logprobs": [], "text_offset": [0, 1]}
    choice = {
        "text": "",
        "logprobs": logprobs,
        "finish_reason": "length",
        "token_ids": [9],
        "prompt_token_ids": [72, 105],
    }
    usage = {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}
    engine = scripted(lambda _: httpx.Response(200, json={"choices": [choice], "usage": usage}))
    candidate = await engine.generate(request({**BODY, "echo": True, "max_tokens": 0}))
    assert (candidate.token_ids, candidate.token_logprobs) == ([], [])
    assert candidate.usage == {"prompt_tokens": 2, "completion_tokens": 0, "total_tokens": 2}


async def test_the_failure_mark_raises_with_the_engines_reason(engine: VllmEngine, fake: FakeEngine) -> None:
    await engine.prepare(KIND, "/versions/kind")
    await engine.commit(KIND)
    fake.fault_for = lambda _: Fault(steering="pool exhausted", after_tokens=2)
    with pytest.raises(SteeringError, match="pool exhausted"):
        await engine.generate(steered("u-1"))
    seen: list[int] = []

    async def consume() -> None:
        async for delta in engine.stream(steered("u-2")):
            seen.extend(delta.token_ids)

    with pytest.raises(SteeringError, match="pool exhausted"):
        await consume()
    assert len(seen) == 2


async def test_a_very_unlikely_echoed_token_is_not_a_failure() -> None:
    logprobs = {"token_logprobs": [None, -9999.0, -0.5]}
    choice = {"text": "x", "logprobs": logprobs, "finish_reason": "stop", "token_ids": [9], "prompt_token_ids": [1, 2]}
    engine = scripted(lambda _: httpx.Response(200, json={"choices": [choice], "usage": {"prompt_tokens": 2}}))
    assert (await engine.generate(steered())).token_logprobs == [-0.5]


@pytest.mark.parametrize("logprobs", [None, {"token_logprobs": []}, {"token_logprobs": [None]}])
async def test_tokens_without_logprobs_are_an_error(logprobs: Any) -> None:
    choice = {"text": "x", "logprobs": logprobs, "finish_reason": "stop", "token_ids": [9]}
    engine = scripted(lambda _: httpx.Response(200, json={"choices": [choice], "usage": {}}))
    with pytest.raises(EngineError, match="without log-probabilities"):
        await engine.generate(steered())


async def test_an_engine_that_is_not_there_is_unavailable() -> None:
    engine = VllmEngine("http://127.0.0.1:1", "engine", build_engine_client())
    calls: list[Callable[[], Any]] = [
        lambda: engine.generate(request()),
        engine.status,
        lambda: engine.take_records(["u"]),
        lambda: engine.prepare(KIND, "/x"),
        lambda: engine.post("/tokenize", {}),
    ]
    for call in calls:
        with pytest.raises(EngineUnavailableError):
            await call()
    with pytest.raises(EngineUnavailableError):
        async for _ in engine.stream(request()):
            pass
    await engine.aclose()


async def test_an_absent_engine_says_when_to_ask_again() -> None:
    engine = VllmEngine("http://127.0.0.1:1", "engine", build_engine_client(), retry_after_s=lambda: 17)
    with pytest.raises(EngineUnavailableError) as caught:
        await engine.status()
    assert caught.value.retry_after_s == 17
    await engine.aclose()


async def test_the_engines_own_key_is_sent_with_every_request() -> None:
    async with build_engine_client("engine-key") as client:
        assert client.headers["authorization"] == "Bearer engine-key"
    async with build_engine_client() as client:
        assert "authorization" not in client.headers


async def raw_server(reply: bytes) -> tuple[asyncio.Server, str]:
    """Sends `reply` to the first request and closes the connection, as a killed engine does."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(reply)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    return server, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{",
    ],
)
async def test_a_connection_that_breaks_means_the_engine_died(reply: bytes) -> None:
    server, url = await raw_server(reply)
    engine = VllmEngine(url, "engine", build_engine_client())
    async with server:
        with pytest.raises(EngineDiedError):
            async for _ in engine.stream(request()):
                pass
        if b"event-stream" not in reply:
            with pytest.raises(EngineDiedError):
                await engine.generate(request())
        await engine.aclose()


async def test_a_stream_without_done_is_an_engine_that_died() -> None:
    chunk: dict[str, Any] = {"choices": [{"text": "x", "token_ids": [], "finish_reason": None}]}
    with pytest.raises(EngineDiedError):
        async for _ in scripted(lambda _: sse(json.dumps(chunk))).stream(request()):
            pass


@pytest.mark.parametrize(
    ("error", "status"),
    [({"message": "bad", "code": 400}, 400), ({"message": "bad", "code": "x"}, 500), ({"message": "bad"}, 500)],
)
async def test_an_error_inside_a_stream_has_the_status_of_its_code(error: dict[str, Any], status: int) -> None:
    with pytest.raises(EngineRequestError, match="bad") as caught:
        async for _ in scripted(lambda _: sse(json.dumps({"error": error}), "[DONE]")).stream(request()):
            pass
    assert caught.value.engine_status == status


@pytest.mark.parametrize(
    ("response", "kind", "message"),
    [
        (
            httpx.Response(400, json={"error": {"message": "too long", "param": "prompt"}}),
            EngineRequestError,
            "too long",
        ),
        (httpx.Response(404, json={"error": "Not here"}), EngineRequestError, "Not here"),
        (httpx.Response(500, text="<html>"), EngineRequestError, "answered 500"),
        (httpx.Response(503, json={"error": {"message": "busy"}}), EngineUnavailableError, "busy"),
        (httpx.Response(500, json={"error": {"message": f"{DEAD_ENGINE}. See"}}), EngineDiedError, "broke"),
        (httpx.Response(200, text="<html>"), EngineError, "unexpected form"),
        (httpx.Response(200, json={"choices": []}), EngineError, "unexpected form"),
        (httpx.Response(200, json=[]), EngineError, "unexpected form"),
    ],
)
async def test_refusals_and_nonsense_are_told_apart(
    response: httpx.Response, kind: type[EngineError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        await scripted(lambda _: response).generate(request())


async def test_a_plain_vllm_server_is_named_as_such() -> None:
    with pytest.raises(EngineUnavailableError, match="trimtab engine"):
        await scripted(lambda _: httpx.Response(404, json={"detail": "Not Found"})).status()


async def test_versions_are_prepared_committed_listed_and_retired(engine: VllmEngine) -> None:
    assert (await engine.prepare(KIND, "/versions/kind")).state == "prepared"
    assert (await engine.commit(KIND)).state == "committed"
    assert [version.version for version in (await engine.status()).versions] == [KIND]
    assert (await engine.retire(KIND)).freed
    assert (await engine.status()).versions == []


@pytest.mark.parametrize("kind", [WeightsError, VocabularyError, AdapterTooLargeError, AdapterError])
async def test_a_refused_version_keeps_the_kind_of_its_error(
    engine: VllmEngine, fake: FakeEngine, kind: type[AdapterError]
) -> None:
    fake.refuse_version = lambda _: kind("not this one")
    with pytest.raises(kind, match="not this one") as caught:
        await engine.prepare(KIND, "/versions/kind")
    assert type(caught.value) is kind


async def test_a_version_without_room_may_be_tried_again(engine: VllmEngine, fake: FakeEngine) -> None:
    fake.weight_budget_bytes = 0
    with pytest.raises(AdapterMemoryFullError, match="full"):
        await engine.prepare(KIND, "/versions/kind")
    fake.weight_budget_bytes = 1
    assert (await engine.prepare(KIND, "/versions/kind")).weight_bytes == 1


async def test_records_are_taken_once(engine: VllmEngine, fake: FakeEngine) -> None:
    fake.keep_record(SteeringRecord(uid="a", num_tokens=1))
    assert set(await engine.take_records(["a", "unknown"])) == {"a"}
    assert await engine.take_records(["a"]) == {}


async def test_records_are_read_from_a_token_on_and_stay(engine: VllmEngine, fake: FakeEngine) -> None:
    values = [-1.0, -2.0, -3.0]
    record = SteeringRecord(
        uid="a",
        num_tokens=3,
        token_ids=[5, 6, 7],
        base_logprobs=values,
        adapter_logprobs=[[None, -0.5, -0.25]],
        negative_logprobs=[None, -4.0, -5.0],
        steered_logprobs=values,
        kl=[0.0, 0.1, 0.2],
        flipped=[False, True, False],
        alternatives=[
            Alternatives(before=[Alternative(token_id=i, base=-1.0, steered=None)], after=[]) for i in (1, 2, 3)
        ],
    )
    fake.keep_record(record)
    read = (await engine.read_records({"a": 1, "unknown": 0}))["a"]
    assert (read.num_tokens, read.token_ids, read.adapter_logprobs) == (2, [6, 7], [[-0.5, -0.25]])
    assert (read.negative_logprobs, read.kl) == ([-4.0, -5.0], [0.1, 0.2])
    assert [at.before[0].token_id for at in read.alternatives or []] == [2, 3]
    assert (await engine.read_records({"a": 3}))["a"].token_ids == []
    assert await engine.take_records(["a"]) == {"a": record}


async def test_a_uid_is_once_in_a_request_and_each_call_gets_its_own_part() -> None:
    calls: list[dict[str, int]] = []

    async def fetch(starts: Any) -> dict[str, SteeringRecord]:
        calls.append(dict(starts))
        return {uid: SteeringRecord(uid=uid, num_tokens=start) for uid, start in starts.items()}

    fetcher = RecordFetcher(fetch)
    wanted = [{"a": 1, "b": 1}, {"a": 2}, {"b": 3}]
    answers = await asyncio.gather(*(fetcher.fetch(starts) for starts in wanted))
    assert [{uid: record.num_tokens for uid, record in answer.items()} for answer in answers] == wanted
    assert calls == [{"a": 1, "b": 1}, {"a": 2, "b": 3}]


async def test_concurrent_takes_share_one_request() -> None:
    calls: list[list[str]] = []
    gate = asyncio.Event()

    async def take(uids: Any) -> dict[str, SteeringRecord]:
        calls.append(list(uids))
        await gate.wait()
        return {uid: SteeringRecord(uid=uid) for uid in uids if uid != "unknown"}

    taker = RecordFetcher(take)
    takes = [asyncio.create_task(taker.fetch(dict.fromkeys(uids, 0))) for uids in (["a"], ["b", "unknown"], ["c"])]
    while not calls:
        await asyncio.sleep(0)
    takes.append(asyncio.create_task(taker.fetch({"d": 0})))
    await asyncio.sleep(0)
    takes[2].cancel()  # a caller that gives up does not disturb the others
    gate.set()
    results = await asyncio.gather(*takes, return_exceptions=True)
    assert calls == [["a", "b", "unknown", "c"], ["d"]]
    assert [set(result) for result in results if isinstance(result, dict)] == [{"a"}, {"b"}, {"d"}]


async def test_a_failed_take_reaches_every_caller_and_the_next_one_works() -> None:
    outcomes: list[Any] = [EngineDiedError("gone"), {"c": SteeringRecord(uid="c")}]

    async def take(uids: Any) -> dict[str, SteeringRecord]:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        result: dict[str, SteeringRecord] = outcome
        return result

    taker = RecordFetcher(take)
    failed = await asyncio.gather(taker.fetch({"a": 0}), taker.fetch({"b": 0}), return_exceptions=True)
    assert [type(outcome) for outcome in failed] == [EngineDiedError, EngineDiedError]
    assert set(await taker.fetch({"c": 0})) == {"c"}


async def test_more_uids_than_one_request_may_carry_are_split() -> None:
    sizes: list[int] = []

    async def take(uids: Any) -> dict[str, SteeringRecord]:
        sizes.append(len(uids))
        return {}

    await RecordFetcher(take).fetch({str(i): 0 for i in range(MAX_UIDS + 1)})
    assert sizes == [MAX_UIDS, 1]


@pytest.mark.parametrize("streams", [True, False])
async def test_giving_up_aborts_the_engines_work(engine: VllmEngine, fake: FakeEngine, streams: bool) -> None:
    fake.hold_after(1)

    async def consume() -> None:
        async with aclosing(engine.stream(request())) as deltas:
            async for _ in deltas:
                pass

    task = asyncio.create_task(consume() if streams else engine.generate(request()))
    await fake.reached_gate.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    if streams:  # the fake's own whole answers do not watch their client
        async with asyncio.timeout(5):
            while fake.observed.running:
                await asyncio.sleep(0.005)
    fake.release()
    assert (await engine.generate(request(uid="u-9"))).text  # its slot is free again


async def test_256_concurrent_streams(engine: VllmEngine, fake: FakeEngine) -> None:
    fake.hold_after(1)

    async def consume(i: int) -> int:
        return len([delta async for delta in engine.stream(request(uid=f"u-{i}"))])

    tasks = [asyncio.create_task(consume(i)) for i in range(256)]
    async with asyncio.timeout(30):
        while fake.observed.running < 256:
            await asyncio.sleep(0.01)
    fake.release()
    assert set(await asyncio.gather(*tasks)) == {5}  # four tokens and the usage


async def test_no_more_candidates_at_a_time_than_allowed(fake: FakeEngine) -> None:
    async with serving(fake_vllm_app(fake)) as url:
        engine = VllmEngine(url, "engine", build_engine_client(), max_concurrent=2)
        await asyncio.gather(*(engine.generate(request(uid=f"u-{i}")) for i in range(8)))
        await engine.aclose()
    assert fake.observed.max_running <= 2


async def test_line_separators_inside_a_chunk_do_not_break_it() -> None:
    choice: dict[str, Any] = {"text": "a\u2028b\u0085c", "token_ids": [], "finish_reason": None}
    chunk = json.dumps({"choices": [choice]}, ensure_ascii=False)
    deltas = [delta async for delta in scripted(lambda _: sse(chunk, "[DONE]")).stream(request())]
    assert deltas[0].choice["text"] == "a\u2028b\u0085c"
