"""`explain`: what each model thought of every token, in whole answers and in every chunk of a stream."""

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import httpx
import pytest
from typing_extensions import override

from fake_gateway import KIND, FakeGateway, asgi_client, build_gateway, serving
from trimtab_adapters.contract.records import SteeringRecord
from trimtab_server.engine.base import EngineDelta, EngineRequest
from trimtab_server.engine.fake import FakeEngine, Fault
from trimtab_server.engine.fake_app import fake_vllm_app
from trimtab_server.engine.vllm_http import VllmEngine, build_engine_client

pytestmark = pytest.mark.anyio

ENDPOINTS = ["completions", "chat.completions"]


async def ask(client: httpx.AsyncClient, endpoint: str = "completions", **body: Any) -> httpx.Response:
    asked = {"prompt": "Hi"} if endpoint == "completions" else {"messages": [{"role": "user", "content": "Hi"}]}
    return await client.post(
        "/v1/completions" if endpoint == "completions" else "/v1/chat/completions",
        json={"model": "kind", "max_tokens": 4, "seed": 1, **asked, **body},
    )


def events(response: httpx.Response) -> list[Any]:
    assert response.status_code == 200, response.text
    parts = [part.removeprefix("data: ") for part in response.text[:-2].split("\n\n")]
    return [json.loads(part) for part in parts if part != "[DONE]"]


@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_each_choice_explains_its_tokens(client: httpx.AsyncClient, gateway: FakeGateway, endpoint: str) -> None:
    steering = {"explain": 3, "plausibility": 0.1}
    data = (await ask(client, endpoint, steering=steering, n=2, best_of=3)).json()
    texts = [c["text"] if endpoint == "completions" else c["message"]["content"] for c in data["choices"]]
    chosen = [rollout for rollout in gateway.log.rollouts if rollout.chosen]
    for choice, text, rollout in zip(data["choices"], texts, chosen, strict=True):
        tokens = choice["explain"]["tokens"]
        assert "".join(token["token"] for token in tokens) == text
        assert [token["token_id"] for token in tokens] == rollout.output_token_ids
        assert [token["base"] for token in tokens] == rollout.base_logprobs
        assert [token["steered"] for token in tokens] == rollout.steered_logprobs
        assert [token["kl"] for token in tokens] == rollout.kl
        assert [token["flipped"] for token in tokens] == rollout.flipped
        ((adapter,), *_) = [token["adapters"] for token in tokens]
        assert (adapter["name"], adapter["version"]) == ("kind", KIND)
        assert rollout.adapter_logprobs is not None
        assert [token["adapters"][0]["logprob"] for token in tokens] == rollout.adapter_logprobs[0]
        for token in tokens:
            assert set(token) == {
                *("token_id", "token", "base", "adapters", "steered", "kl", "flipped", "before", "after")
            }
            assert len(token["before"]) == len(token["after"]) == 3
            assert all(set(entry) == {"token_id", "token", "base", "steered"} for entry in token["before"])
            assert token["after"][0]["token"] == token["token"]
            assert token["before"][1]["steered"] is None  # what the plausibility mask excludes
    texts_asked = [body["tokens"] for path, body in gateway.engine.observed.posted if path == "/detokenize"]
    assert all(len(token_ids) == 1 for token_ids in texts_asked)
    assert len(texts_asked) == len({token_ids[0] for token_ids in texts_asked})


@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_every_chunk_explains_exactly_its_tokens(gateway: FakeGateway, endpoint: str) -> None:
    async with asgi_client(gateway.app) as client:
        steering = {"explain": True, "negative_prompt": "Rude" if endpoint == "completions" else RUDE}
        whole = (await ask(client, endpoint, steering=steering, n=2, best_of=2)).json()
        chunks = events(await ask(client, endpoint, steering=steering, n=2, stream=True, return_token_ids=True))
    explained: dict[int, list[Any]] = {0: [], 1: []}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        tokens = choice.get("explain", {"tokens": []})["tokens"]
        assert [token["token_id"] for token in tokens] == choice.get("token_ids", [])
        explained[choice["index"]] += tokens
    by_text = {json.dumps(choice["explain"]["tokens"]) for choice in whole["choices"]}
    assert {json.dumps(tokens) for tokens in explained.values()} == by_text
    assert all(token["negative"] is not None for tokens in explained.values() for token in tokens)
    assert [set(starts.values()) for starts in gateway.engine.observed.read[:2]] == [{0}, {0}]
    # the whole records are taken and checked in the end all the same
    assert len(gateway.engine.observed.taken[-1]) == 2
    assert len(gateway.log.rollouts) == 4


RUDE = [{"role": "user", "content": "Be rude."}]


@pytest.mark.parametrize("streams", [False, True])
async def test_an_unsteered_answer_can_be_explained(gateway: FakeGateway, streams: bool) -> None:
    async with asgi_client(gateway.app) as client:
        response = await ask(client, model="base", steering={"explain": 2}, stream=streams)
    choices = [c for e in events(response) for c in e["choices"]] if streams else response.json()["choices"]
    tokens = [token for choice in choices for token in choice.get("explain", {"tokens": []})["tokens"]]
    assert len(tokens) == 4
    for token in tokens:
        assert token["base"] == token["steered"]
        assert (token["adapters"], token["kl"], token["flipped"]) == ([], 0.0, False)
        assert token["before"] == token["after"]
    assert "x-trimtab-steering" not in response.headers
    assert '"steering"' not in response.text
    (rollout,) = gateway.log.rollouts
    assert (rollout.steering, rollout.adapter_logprobs, rollout.kl) == ([], None, None)
    assert "steered_tokens_total{" not in gateway.parts.metrics.render().decode()


async def test_no_alternatives_and_tokens_outside_the_schedule(client: httpx.AsyncClient) -> None:
    data = (await ask(client, steering={"explain": 0, "schedule": {"first": 2}})).json()
    tokens = data["choices"][0]["explain"]["tokens"]
    assert [token["adapters"][0]["logprob"] is None for token in tokens] == [False, False, True, True]
    assert all(token["before"] == token["after"] == [] for token in tokens)


async def test_false_and_null_explain_nothing(client: httpx.AsyncClient, gateway: FakeGateway) -> None:
    for explain in (False, None):
        data = (await ask(client, model="base", steering={"explain": explain})).json()
        assert "explain" not in data["choices"][0]
    assert [request.steering for request in gateway.engine.observed.requests] == [None, None]


async def test_texts_are_ids_where_the_caller_wants_ids(client: httpx.AsyncClient, gateway: FakeGateway) -> None:
    data = (await ask(client, steering={"explain": 1}, return_tokens_as_token_ids=True)).json()
    before = data["choices"][0]["explain"]["tokens"][0]["before"][0]
    assert before["token"] == f"token_id:{before['token_id']}"
    assert not any(path == "/detokenize" for path, _ in gateway.engine.observed.posted)


async def test_an_echoed_prompt_is_not_explained(client: httpx.AsyncClient) -> None:
    data = (await ask(client, steering={"explain": 1}, echo=True, logprobs=0)).json()
    (choice,) = data["choices"]
    assert "".join(token["token"] for token in choice["explain"]["tokens"]) == choice["text"].removeprefix("Hi")
    alone = (await ask(client, steering={"explain": 1}, echo=True, max_tokens=0)).json()
    assert alone["choices"][0]["explain"] == {"tokens": []}


@pytest.mark.parametrize("streams", [False, True])
async def test_failed_steering_is_never_explained_away(streams: bool) -> None:
    fault = Fault(steering="the adapter's logits are NaN", after_tokens=2)
    gateway = build_gateway(fake=FakeEngine(fault_for=lambda _: fault))
    async with asgi_client(gateway.app) as client:
        response = await ask(client, steering={"explain": True}, stream=streams)
    if not streams:
        assert (response.status_code, response.json()["error"]["code"]) == (500, "steering_failed")
        return
    *chunks, last = events(response)
    assert [len(chunk["choices"][0]["explain"]["tokens"]) for chunk in chunks] == [1, 1]
    assert last["error"]["code"] == "steering_failed"
    assert "[DONE]" not in response.text


class Forgetful(FakeEngine):
    """Reads answer what `change` makes of the records."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    @override
    async def read_records(self, starts: Mapping[str, int]) -> dict[str, SteeringRecord]:
        records = await super().read_records(starts)
        return {uid: changed for uid, record in records.items() if (changed := self.change(record)) is not None}

    @override
    async def take_records(self, uids: Sequence[str]) -> dict[str, SteeringRecord]:
        records = await super().take_records(uids)
        return {uid: changed for uid, record in records.items() if (changed := self.change(record)) is not None}


@pytest.mark.parametrize(
    "change",
    [
        lambda record: None,
        lambda record: record.model_copy(update={"token_ids": [0] * len(record.token_ids)}),
        lambda record: record.model_copy(update={"status": "failed", "error": "lost"}),
        lambda record: record.model_copy(update={"alternatives": None}),
        lambda record: record.model_copy(update={"adapter_logprobs": []}),
    ],
)
@pytest.mark.parametrize("streams", [False, True])
async def test_a_record_that_does_not_explain_the_tokens_is_an_error(change: Any, streams: bool) -> None:
    gateway = build_gateway(fake=Forgetful(change))
    async with asgi_client(gateway.app) as client:
        response = await ask(client, steering={"explain": True}, stream=streams)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "steering_failed")
    assert gateway.log.rollouts == []


async def test_over_http_the_reads_of_all_candidates_share_requests_and_come_as_tokens_do() -> None:
    fake = FakeEngine()
    async with serving(fake_vllm_app(fake)) as engine_url:
        engine = VllmEngine(engine_url, "engine", build_engine_client())
        gateway = build_gateway(fake=fake, engine=engine)
        fake.hold_after(1)
        async with serving(gateway.app) as url, httpx.AsyncClient(base_url=url) as client:
            body = {"model": "kind", "prompt": "Hi", "max_tokens": 3, "n": 8, "stream": True}
            body["steering"] = {"explain": 1}
            async with asyncio.timeout(30), client.stream("POST", "/v1/completions", json=body) as response:
                lines = response.aiter_lines()
                first = json.loads((await anext(lines)).removeprefix("data: "))
                assert len(first["choices"][0]["explain"]["tokens"]) == 1
                fake.release()
                rest = [line async for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert all('"explain"' in line for line in rest[:-1])
    assert len(rest) == 8 * 3
    assert sum(len(starts) for starts in fake.observed.read) == 24
    assert len(fake.observed.read) < 24


async def test_tokens_that_a_parser_holds_back_are_explained_all_the_same() -> None:
    class Parsing(FakeEngine):
        """As with a reasoning or tool parser: tokens arrive whose text is not shown yet."""

        @override
        async def raw_stream(self, request: EngineRequest) -> AsyncGenerator[EngineDelta, None]:
            async for delta in super().raw_stream(request):
                if "delta" in delta.choice:
                    delta.choice["delta"] = {}
                yield delta

    async with asgi_client(build_gateway(fake=Parsing()).app) as client:
        chunks = events(await ask(client, "chat.completions", steering={"explain": 1}, stream=True))
    assert [len(chunk["choices"][0]["explain"]["tokens"]) for chunk in chunks] == [1, 1, 1, 1]
