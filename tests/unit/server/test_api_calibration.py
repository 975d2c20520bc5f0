"""The field `calibration` over HTTP, before anything is generated."""

from typing import Any

import httpx
import pytest

from fake_gateway import FakeGateway

pytestmark = pytest.mark.anyio


async def post(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    fields = {"model": "base", "prompt": "Hi", "max_tokens": 3, "best_of": 3, "reward": "length"}
    return await client.post("/v1/completions", json={**fields, **body})


@pytest.fixture
def gateway_with_reward(gateway: FakeGateway) -> FakeGateway:
    gateway.scoring.rewards["length"] = lambda prompt, output: float(len(output))
    return gateway


async def test_what_does_not_go_with_the_request_is_refused_before_anything_is_generated(
    client: httpx.AsyncClient, gateway_with_reward: FakeGateway
) -> None:
    for body, param in (
        ({"model": "kind", "calibration": {"method": "leave_one_out"}}, "calibration.method"),
        ({"best_of": 1, "calibration": {"method": "leave_one_out"}}, "calibration.method"),
        ({"calibration": {"method": "pooled", "size": 4}}, "calibration.size"),
        ({"calibration": {"allow_stale": True}}, "calibration.allow_stale"),
        ({"calibration": {"method": "guess"}}, "calibration.method"),
        (
            {"calibration": {"method": "none"}, "selection": {"strategy": "adaptive", "threshold": 0.9}},
            "calibration",
        ),
    ):
        answer = await post(client, **body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), body
    assert gateway_with_reward.engine.observed.requests == []


async def test_a_size_alone_means_what_it_always_did(
    client: httpx.AsyncClient, gateway_with_reward: FakeGateway
) -> None:
    answer = await post(client, calibration={"size": 4})
    assert answer.json()["choices"][0]["selection"]["reward"]["calibration_size"] == 4
    assert (await post(client, model="kind", calibration={"size": 2})).status_code == 200
