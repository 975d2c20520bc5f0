"""A canary on a real engine: both versions answer, and the gateway ends it by itself."""

import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from gateway_process import RunningGateway

pytestmark = pytest.mark.engine

ROUTE = "tried"


def ask(client: httpx.Client, request_id: str) -> dict[str, Any]:
    body = {"model": ROUTE, "prompt": "t1 t2 t3", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    answer = client.post("/v1/completions", json=body, headers={"x-request-id": request_id})
    answer.raise_for_status()
    return dict(answer.json())


def wait_for(client: httpx.Client, is_there: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        route: dict[str, Any] = client.get(f"/admin/routes/{ROUTE}").json()
        if is_there(route):
            return route
        time.sleep(0.1)
    raise AssertionError(f"the canary did not end: {route}")


def version_of(client: httpx.Client, route: str) -> str:
    return str(client.get(f"/admin/routes/{route}").json()["steering"][0]["version"])


def promote(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post(f"/admin/routes/{ROUTE}/promote", json={"percent": 50, **body})


def test_a_canary_takes_its_share_and_then_the_route_or_nothing(gateway: RunningGateway) -> None:
    """Of 40 requests at 50 % the odds that one side gets fewer than 8 are below 1 in 10,000, and the ids are fixed."""
    with gateway.client() as client:
        old, new = version_of(client, "adapter"), version_of(client, "other")
        steering = {"adapters": [{"name": "adapter", "version": old}]}
        client.put(f"/admin/routes/{ROUTE}", json={"steering": steering}).raise_for_status()
        refused = promote(client, adapter="other")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "gate_not_passed")
        forced = {"adapter": "other", "force": True, "num_answers": 1000, "min_answers": 4, "timeout_s": 3600}
        promote(client, **forced).raise_for_status()

        texts: dict[str, set[str]] = {old: set(), new: set()}
        for i in range(40):
            answer = ask(client, f"canary-{i}")
            (adapter,) = answer["steering"]["adapters"]
            assert answer["canary"]["is_canary"] is (adapter["version"] == new)
            texts[adapter["version"]].add(answer["choices"][0]["text"])
        assert {version: len(found) for version, found in texts.items()} == {old: 1, new: 1}, "greedy: one text each"
        outcomes = client.get(f"/admin/routes/{ROUTE}/canary").json()["outcomes"]
        counts = [outcomes[arm]["num_answers"] for arm in ("canary", "stable")]
        assert sum(counts) == 40
        assert min(counts) >= 8
        client.post(f"/admin/routes/{ROUTE}/rollback", json={}).raise_for_status()
        assert "canary" not in ask(client, "canary-0")

        promote(client, **{**forced, "num_answers": 4}).raise_for_status()
        revision = client.get(f"/admin/routes/{ROUTE}").json()["revision"]
        for i in range(40):
            ask(client, f"again-{i}")
        promoted = wait_for(client, lambda route: route["canary"] is None)
        assert promoted["revision"] == revision + 1
        assert promoted["steering"][0]["version"] == new
        assert "promoted: not worse over" in promoted["comment"]

        back = {"adapter": "adapter", "force": True, "num_answers": 1000, "min_answers": 500, "timeout_s": 0.5}
        promote(client, **back).raise_for_status()
        ended = wait_for(client, lambda route: route["canary"] is None)
        assert ended["steering"][0]["version"] == new
        assert "rolled back: after" in ended["comment"]
        client.delete(f"/admin/routes/{ROUTE}").raise_for_status()
