"""The gateway over a real engine as its own judge."""

import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from gateway_process import RunningGateway
from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_adapters.contract.rewards import RewardInput, RewardSpec
from trimtab_server.rewards.judge_answers import read_chat, read_completion
from trimtab_server.rewards.registry import RewardRegistry

pytestmark = [pytest.mark.engine, pytest.mark.anyio]

TEMPLATE = "{prompt} t1 {output} t2"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def registry() -> AsyncIterator[RewardRegistry]:
    registry = RewardRegistry()
    yield registry
    await registry.aclose()


def judge(gateway: RunningGateway, **options: Any) -> RewardSpec:
    # Each token of the tiny vocabulary is a `t` and a number, so that whatever the random model says is a rating.
    options = {"model": "base", "template": TEMPLATE, "method": "text", "lowest": 0, "max_tokens": 1} | options
    return RewardSpec(name="judge", kind="llm_judge", target=f"{gateway.url}/v1", options=options)


@pytest.mark.parametrize("api", ["chat", "completions"])
async def test_the_rating_is_what_the_base_says_to_the_template(
    gateway: RunningGateway, registry: RewardRegistry, api: str
) -> None:
    item = RewardInput(prompt="t5 t6", output="t7")
    question = "t5 t6 t1 t7 t2"
    body: dict[str, Any] = {"model": "base", "max_tokens": 1, "temperature": 0.0}
    asked = {"messages": [{"role": "user", "content": question}]} if api == "chat" else {"prompt": question}
    path = "/v1/chat/completions" if api == "chat" else "/v1/completions"
    async with httpx.AsyncClient(base_url=gateway.url, trust_env=False) as client:
        choice = (await client.post(path, json={**body, **asked})).json()["choices"][0]
    said = choice["message"]["content"] if api == "chat" else choice["text"]
    await registry.add(judge(gateway, api=api, highest=100))
    number = re.search(r"\d+", said)
    assert number is not None, said
    assert await (await registry.batched("judge")).score([item]) == [float(number[0])]


@pytest.mark.parametrize("api", ["chat", "completions"])
async def test_the_gateway_gives_the_probabilities_that_expected_ratings_need(
    gateway: RunningGateway, registry: RewardRegistry, api: str
) -> None:
    is_chat = api == "chat"
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "t5 t6"}]} if is_chat else {"prompt": "t5 t6"}
    asked |= {"logprobs": True, "top_logprobs": 5} if is_chat else {"logprobs": 5}
    async with httpx.AsyncClient(base_url=gateway.url, trust_env=False) as client:
        body = {"model": "base", "max_tokens": 3, "temperature": 0.0, **asked}
        answer = (await client.post("/v1/chat/completions" if is_chat else "/v1/completions", json=body)).json()
    judged = (read_chat if is_chat else read_completion)("judge", answer)
    assert judged.tokens is not None
    assert judged.top_logprobs is not None
    assert len(judged.tokens) == len(judged.top_logprobs) == 3
    for token, top in zip(judged.tokens, judged.top_logprobs, strict=True):
        assert len(top) >= 5
        assert max(top, key=lambda entry: entry[1])[0] == token  # greedy
    # `t<number>` is no rating by itself, so that this judge is refused, and not read as something that it did not say.
    with pytest.raises(InvalidRequestError, match=r"one token|rated outside of 0 to 9"):
        await registry.add(judge(gateway, api=api, method="expected", highest=9))
