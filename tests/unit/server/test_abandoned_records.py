"""An engine does not keep the records of candidates that nobody will ask about."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from fake_gateway import KIND, FakeGateway, asgi_client, build_gateway, failing_reward
from trimtab_server.decoding.job import GenerationJob, PromptInput
from trimtab_server.decoding.job_stream import JobStream
from trimtab_server.engine.fake import FakeEngine, Fault

pytestmark = pytest.mark.anyio

BODY: dict[str, Any] = {
    "model": "base",
    "prompt": "Hi",
    "max_tokens": 4,
    "steering": {"adapters": [{"name": "kind", "version": KIND, "alpha": 1.0}]},
}


@pytest.fixture
def gateway() -> FakeGateway:
    gateway = build_gateway()
    gateway.scoring.rewards["broken"] = failing_reward
    gateway.parts.abandoned._delay_s = 0.0
    return gateway


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


def num_kept(engine: FakeEngine) -> int:
    return len(engine._records)


async def test_of_a_request_whose_reward_fails_nothing_is_kept(gateway: FakeGateway) -> None:
    async with asgi_client(gateway.app) as client:
        response = await client.post("/v1/completions", json=BODY | {"best_of": 4, "reward": "broken"})
        assert response.status_code == 502
        await until(lambda: num_kept(gateway.engine) == 0)


async def test_of_a_request_of_which_one_candidate_fails_nothing_is_kept(gateway: FakeGateway) -> None:
    gateway.engine.fault_for = lambda request: (
        Fault(steering="broken", after_tokens=2) if request.request_id.endswith("-1") else None
    )
    async with asgi_client(gateway.app) as client:
        response = await client.post("/v1/completions", json=BODY | {"n": 3})
        assert response.status_code == 500
        await until(lambda: num_kept(gateway.engine) == 0)


async def test_of_a_stream_that_was_left_nothing_is_kept(gateway: FakeGateway) -> None:
    job = GenerationJob(
        id="cmpl-left",
        endpoint="completions",
        resolved=await gateway.catalog.resolve("kind", None),
        prompts=(PromptInput({"prompt": "Hi"}, "Hi"),),
        body={"max_tokens": 2, "logprobs": 0, "return_token_ids": True},
        record=True,
    )
    stream = JobStream(gateway.parts.generator(), job)
    await stream.start()
    async for _ in stream:
        pass
    assert num_kept(gateway.engine) == 1, "the record waits to be taken"
    await stream.aclose()  # instead of asking for the result
    await until(lambda: num_kept(gateway.engine) == 0)


async def test_records_of_an_answer_are_taken_once(gateway: FakeGateway) -> None:
    async with asgi_client(gateway.app) as client:
        response = await client.post("/v1/completions", json=BODY)
        assert response.status_code == 200
        await asyncio.sleep(0.02)
    assert len(gateway.engine.observed.taken) == 1
