"""The official `openai` package against the gateway, over a socket, with vLLM's protocol between gateway and engine."""

import asyncio
from collections.abc import AsyncIterator

import openai
import pytest

from fake_gateway import KIND, FakeGateway, build_gateway, serving
from trimtab_adapters.contract.errors import EngineDiedError, EngineUnavailableError
from trimtab_server.engine.base import EngineRequest
from trimtab_server.engine.fake import FakeEngine, Fault
from trimtab_server.engine.fake_app import fake_vllm_app
from trimtab_server.engine.vllm_http import VllmEngine, build_engine_client

pytestmark = pytest.mark.anyio


def fault_for(request: EngineRequest) -> Fault | None:
    """Prompts of the tests below ask for their own trouble."""
    prompt = request.body.get("prompt")
    if prompt == "die at once":
        return Fault(EngineUnavailableError("starting"))
    if prompt == "die later":
        return Fault(EngineDiedError("gone"), after_tokens=2)
    if prompt == "steer wrongly":
        return Fault(steering="NaN in the adapter's logits", after_tokens=1)
    return None


@pytest.fixture
async def served(anyio_backend: str) -> AsyncIterator[tuple[FakeGateway, str]]:
    fake = FakeEngine(fault_for=fault_for)
    async with serving(fake_vllm_app(fake)) as engine_url:
        engine = VllmEngine(engine_url, "engine", build_engine_client())
        gateway = build_gateway(fake=fake, engine=engine, api_keys=("key",))
        async with serving(gateway.app) as url:
            yield gateway, url


@pytest.fixture
async def client(served: tuple[FakeGateway, str]) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{served[1]}/v1", api_key="key", max_retries=0) as client:
        yield client


async def collect(client: openai.AsyncOpenAI, model: str, prompt: str, pieces: list[str]) -> None:
    async for chunk in await client.completions.create(model=model, prompt=prompt, stream=True):
        pieces.append(chunk.choices[0].text)


async def test_completion_with_everything(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(
        model="kind",
        prompt=["Hi", "Yo"],
        best_of=3,
        n=2,
        echo=True,
        frequency_penalty=0.1,
        logit_bias={"260": 1},
        logprobs=2,
        max_tokens=4,
        presence_penalty=0.1,
        seed=3,
        stop=["zzz"],
        temperature=0.9,
        top_p=0.9,
        user="ann",
        extra_body={"steering_logprobs": True, "return_token_ids": True},
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text[:2] for choice in answer.choices] == ["Hi", "Hi", "Yo", "Yo"]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert len(logprobs.tokens) == 2 + 4
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 2 * 3 * 4)
    assert answer.model_extra is not None
    assert answer.model_extra["steering"]["adapters"][0]["version"] == KIND
    extra = answer.choices[0].model_extra
    assert extra is not None
    assert len(extra["steering_logprobs"]["kl"]) == len(extra["token_ids"]) == 4
    assert extra["selection"]["num_candidates"] == 3


async def test_streamed_completion_equals_the_whole_one(client: openai.AsyncOpenAI) -> None:
    whole = await client.completions.create(model="kind", prompt="Hi", n=2, seed=1)
    texts, usage = ["", ""], None
    stream = await client.completions.create(
        model="kind", prompt="Hi", n=2, seed=1, stream=True, stream_options={"include_usage": True}
    )
    async for chunk in stream:
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert usage == whole.usage


async def test_chat_whole_and_streamed(client: openai.AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(
        model="kind", messages=[{"role": "user", "content": "Hi"}], seed=1, logprobs=True, top_logprobs=1, max_tokens=4
    )
    assert whole.choices[0].logprobs is not None
    assert whole.choices[0].logprobs.content is not None
    assert len(whole.choices[0].logprobs.content) == 4
    text = ""
    async for chunk in await client.chat.completions.create(
        model="kind", messages=[{"role": "user", "content": "Hi"}], seed=1, max_tokens=4, stream=True
    ):
        text += chunk.choices[0].delta.content or ""
    assert text == whole.choices[0].message.content


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["base", "kind"]
    assert (await client.models.retrieve("kind")).owned_by == "trimtab"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("nobody")


async def test_errors_have_the_clients_own_classes(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await client.completions.create(model="base", prompt="Hi", n=3, best_of=2)
    assert (bad.value.param, bad.value.type) == ("best_of", "invalid_request_error")
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.completions.create(model="nobody", prompt="Hi")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.InternalServerError) as down:
        await client.completions.create(model="base", prompt="die at once")
    assert (down.value.status_code, down.value.response.headers["retry-after"]) == (503, "1")
    assert down.value.request_id


async def test_an_error_in_mid_stream_raises_api_error(client: openai.AsyncOpenAI) -> None:
    pieces: list[str] = []
    with pytest.raises(openai.APIError) as error:
        await collect(client, "base", "die later", pieces)
    assert len(pieces) == 2
    assert error.value.code in ("engine_error", "engine_died")


async def test_failed_steering_raises_and_its_token_is_withheld(client: openai.AsyncOpenAI) -> None:
    pieces: list[str] = []
    with pytest.raises(openai.APIError, match="NaN in the adapter's logits"):
        await collect(client, "kind", "steer wrongly", pieces)
    assert len(pieces) == 1
    with pytest.raises(openai.InternalServerError, match="NaN in the adapter's logits"):
        await client.completions.create(model="kind", prompt="steer wrongly")


async def test_an_error_before_the_first_token_of_a_stream_has_its_status(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as error:
        await client.completions.create(model="base", prompt="die at once", stream=True)
    assert error.value.status_code == 503


async def test_closing_a_stream_aborts_the_engine(client: openai.AsyncOpenAI, served: tuple[FakeGateway, str]) -> None:
    fake = served[0].engine
    fake.hold_after(1)
    stream = await client.completions.create(model="kind", prompt="Hi", n=2, stream=True)
    async for _ in stream:
        break
    await stream.close()
    while fake.observed.running:
        await asyncio.sleep(0.005)
    assert len(fake.observed.aborted) == 2


async def test_32_concurrent_streams_each_get_their_own_text(client: openai.AsyncOpenAI) -> None:
    async def text(seed: int) -> str:
        stream = await client.completions.create(model="kind", prompt="Hi", seed=seed, max_tokens=8, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    texts = await asyncio.gather(*(text(seed) for seed in range(32)))
    for seed in (0, 31):
        whole = await client.completions.create(model="kind", prompt="Hi", seed=seed, max_tokens=8)
        assert whole.choices[0].text == texts[seed]
