import asyncio
import json
from typing import Any

import httpx
import pytest

from fake_gateway import KIND, FakeGateway, asgi_client, build_gateway, serving
from trimtab_adapters.contract.errors import EngineDiedError, StorageError
from trimtab_server.engine.fake import FakeEngine, Fault

pytestmark = pytest.mark.anyio

STEERING = {"adapters": [{"name": "kind", "version": KIND, "alpha": 1.0}]}


def events_of(text: str) -> list[Any]:
    """The data of each event; the text is checked to hold nothing else."""
    assert text.endswith("\n\n")
    parts = text[:-2].split("\n\n")
    assert all(part.startswith("data: ") for part in parts)
    return [part[6:] if part == "data: [DONE]" else json.loads(part[6:]) for part in parts]


async def stream(client: httpx.AsyncClient, path: str = "/v1/completions", **body: Any) -> list[Any]:
    response = await client.post(path, json={"model": "base", "prompt": "Hi", "stream": True, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return events_of(response.text)


def texts_of(chunks: list[Any]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return texts


async def whole_texts(client: httpx.AsyncClient, **body: Any) -> dict[int, str]:
    response = await client.post("/v1/completions", json={"model": "base", "prompt": "Hi", **body})
    return {choice["index"]: choice["text"] for choice in response.json()["choices"]}


async def settle(fake: FakeEngine) -> None:
    async with asyncio.timeout(5):
        while fake.observed.running:
            await asyncio.sleep(0.005)


async def test_a_stream_is_chunks_of_one_id_and_ends_with_done(client: httpx.AsyncClient) -> None:
    *chunks, done = await stream(client, max_tokens=3)
    assert done == "[DONE]"
    assert len(chunks) == 3
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "length"]
    assert all("usage" not in chunk and "steering" not in chunk for chunk in chunks)
    assert set(chunks[0]["choices"][0]) == {"index", "text", "logprobs", "finish_reason", "stop_reason"}


async def test_streamed_texts_equal_the_whole_ones_for_every_choice(client: httpx.AsyncClient) -> None:
    body: dict[str, Any] = {"prompt": ["Hi", "Yo"], "n": 3, "best_of": 3, "seed": 2, "max_tokens": 4, "echo": True}
    *chunks, _ = await stream(client, **body)
    del body["best_of"]  # which would rank the whole answer
    assert texts_of(chunks) == await whole_texts(client, **body)
    assert sorted(texts_of(chunks)) == [0, 1, 2, 3, 4, 5]


async def test_usage_comes_once_at_the_end_and_is_null_before(client: httpx.AsyncClient) -> None:
    *chunks, last, _ = await stream(client, n=2, max_tokens=3, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8}


async def test_continuous_usage_counts_the_tokens_of_each_choice(client: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last, _ = await stream(client, max_tokens=3, stream_options=options)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3]
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {2}
    assert last["usage"]["total_tokens"] == 5


async def test_steering_is_reported_in_the_first_and_the_last_chunk_only(client: httpx.AsyncClient) -> None:
    *chunks, _ = await stream(client, model="kind", n=2, max_tokens=3)
    assert [chunk.get("steering") for chunk in chunks] == [STEERING, None, None, None, None, STEERING]
    *chunks, _ = await stream(client, model="kind", max_tokens=3, stream_options={"include_usage": True})
    assert [chunk.get("steering") for chunk in chunks] == [STEERING, None, None, STEERING]


async def test_streamed_echo_with_logprobs_has_offsets_into_the_text(client: httpx.AsyncClient) -> None:
    *chunks, _ = await stream(client, echo=True, logprobs=0, max_tokens=3, return_token_ids=True)
    text = texts_of(chunks)[0]
    tokens = [token for chunk in chunks for token in chunk["choices"][0]["logprobs"]["tokens"]]
    offsets = [offset for chunk in chunks for offset in chunk["choices"][0]["logprobs"]["text_offset"]]
    assert len(tokens) == 2 + 3
    for token, offset in zip(tokens, offsets, strict=True):
        assert text[offset : offset + len(token)] == token
    assert [len(chunk["choices"][0]["token_ids"]) for chunk in chunks] == [1, 1, 1]
    assert [chunk["choices"][0].get("prompt_token_ids") for chunk in chunks] == [[72, 105], None, None]


async def test_streamed_echo_alone_returns_the_prompt(client: httpx.AsyncClient) -> None:
    *chunks, _ = await stream(client, echo=True, max_tokens=0, stream_options={"include_usage": True})
    assert texts_of(chunks) == {0: "Hi"}
    assert chunks[-1]["usage"]["completion_tokens"] == 0


async def test_steering_logprobs_come_with_the_end_of_their_choice(client: httpx.AsyncClient) -> None:
    *chunks, _ = await stream(client, model="kind", n=2, max_tokens=3, steering_logprobs=True)
    choices = [chunk["choices"][0] for chunk in chunks]
    for choice in choices:
        assert ("steering_logprobs" in choice) == (choice["finish_reason"] is not None)
    assert all(len(c["steering_logprobs"]["kl"]) == 3 for c in choices if c["finish_reason"])


async def test_an_error_after_the_first_byte_is_an_event_and_there_is_no_done() -> None:
    fake = FakeEngine(
        fault_for=lambda r: Fault(EngineDiedError("gone"), after_tokens=2) if "-0-1" in r.request_id else None
    )
    gateway = build_gateway(fake=fake)
    async with asgi_client(gateway.app) as client:
        *chunks, last = await stream(client, n=3)
    assert last == {"error": {"message": "gone", "type": "server_error", "param": None, "code": "engine_died"}}
    assert chunks
    assert fake.observed.running == 0
    assert gateway.log.rollouts == []


async def test_a_token_whose_steering_failed_is_never_passed_on() -> None:
    good = build_gateway()
    async with asgi_client(good.app) as client:
        expected = texts_of((await stream(client, model="kind", seed=1, max_tokens=5))[:-1])[0].split()
    fault = Fault(steering="cache exhausted", after_tokens=2)
    async with asgi_client(build_gateway(fake=FakeEngine(fault_for=lambda _: fault)).app) as client:
        *chunks, last = await stream(client, model="kind", seed=1, max_tokens=5)
    assert texts_of(chunks)[0].split() == expected[:2]
    assert last["error"]["code"] == "steering_failed"
    assert "cache exhausted" in last["error"]["message"]


async def test_steering_that_fails_at_once_has_status_500() -> None:
    fake = FakeEngine(fault_for=lambda _: Fault(steering="no memory"))
    async with asgi_client(build_gateway(fake=fake).app) as client:
        response = await client.post("/v1/completions", json={"model": "kind", "prompt": "Hi", "stream": True})
    assert (response.status_code, response.json()["error"]["code"]) == (500, "steering_failed")


async def test_rollouts_are_on_disk_before_done_is_sent(gateway: FakeGateway) -> None:
    gateway.log.gate = asyncio.Event()
    async with serving(gateway.app) as url, httpx.AsyncClient(base_url=url) as client:
        body = {"model": "base", "prompt": "Hi", "stream": True, "max_tokens": 2}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.aiter_lines()
            seen = [line for _ in range(4) if (line := await anext(lines))]
            assert '"finish_reason":"length"' in seen[1]
            rest = asyncio.ensure_future(anext(lines))
            await asyncio.wait({rest}, timeout=0.05)
            assert not rest.done()
            gateway.log.gate.set()
            assert await rest == "data: [DONE]"
    assert len(gateway.log.rollouts) == 1


async def test_a_log_that_fails_at_the_end_of_a_stream_is_an_error_event(gateway: FakeGateway) -> None:
    gateway.log.error = StorageError("disk full")
    async with asgi_client(gateway.app) as client:
        *_, last = await stream(client)
    assert last["error"]["code"] == "storage_error"


async def test_tokens_arrive_while_the_engine_is_still_speaking(gateway: FakeGateway) -> None:
    gateway.engine.hold_after(2)
    async with serving(gateway.app) as url, httpx.AsyncClient(base_url=url) as client:
        body = {"model": "base", "prompt": "Hi", "stream": True, "max_tokens": 4}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.aiter_lines()
            assert json.loads((await anext(lines))[6:])["choices"][0]["text"]
            assert gateway.engine.observed.running == 1
            gateway.engine.release()
            assert [line async for line in lines][-2] == "data: [DONE]"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("num_tokens", [0, 2])
async def test_a_client_that_leaves_ends_the_engines_work(path: str, streams: bool, num_tokens: int) -> None:
    gateway = build_gateway()
    gateway.engine.hold_after(num_tokens)
    body: dict[str, Any] = {"model": "kind", "stream": streams, "n": 3}
    body |= {"prompt": "Hi"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "Hi"}]}
    async with serving(gateway.app) as url, httpx.AsyncClient(base_url=url) as client:
        asking = asyncio.create_task(client.post(path, json=body))
        await gateway.engine.reached_gate.wait()
        while gateway.engine.observed.running < 3:
            await asyncio.sleep(0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await settle(gateway.engine)
        assert len(gateway.engine.observed.aborted) == 3
        assert gateway.residency.in_flight(KIND) == 0
        gateway.engine.release()
        metrics = (await client.get("/metrics")).text
    assert gateway.log.rollouts == []
    assert 'trimtab:num_requests_running{model_name="kind"} 0.0' in metrics
    kind = "completions" if path == "/v1/completions" else "chat.completions"
    assert f'trimtab:request_disconnects_total{{endpoint="{kind}"}} 1.0' in metrics


async def test_a_stream_that_takes_too_long_ends_with_an_error_event() -> None:
    gateway = build_gateway(request_timeout_s=0.2)
    gateway.engine.hold_after(2)
    async with serving(gateway.app) as url, httpx.AsyncClient(base_url=url) as client:
        *chunks, last = await stream(client, max_tokens=4)
    assert len(chunks) == 2
    assert last["error"]["code"] == "request_timeout"
    assert gateway.engine.observed.running == 0


async def test_text_with_line_separators_stays_one_event(client: httpx.AsyncClient) -> None:
    # U+2028 and U+0085 end a line for some readers
    *chunks, _ = await stream(client, prompt="a\u2028b\u0085c", echo=True, max_tokens=1)
    assert texts_of(chunks)[0].startswith("a\u2028b\u0085c")
