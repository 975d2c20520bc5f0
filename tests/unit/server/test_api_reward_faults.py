"""A request whose reward is a server that misbehaves: a right answer or an error, never a number made up."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from fake_gateway import FakeGateway, asgi_client, build_gateway
from scripted_server import Scripted, ScriptedServer, scripted_server
from trimtab_adapters.contract.rewards import RewardSpec
from trimtab_server.decoding.reference import MemoryCalibratorStore, ReferenceCalibrators
from trimtab_server.decoding.scoring import CalibratedScoring
from trimtab_server.rewards.registry import RewardRegistry

pytestmark = pytest.mark.anyio

LIMITS = {"max_retries": 0, "timeout_s": 0.2, "cache_size": 0}
BODY = {"model": "base", "prompt": "p", "max_tokens": 4, "best_of": 6, "reward": "letters", "calibration": {"size": 8}}


def letters(text: str) -> float:
    return float(sum(map(ord, text)) % 101)


class Letters:
    """Answers the JSON contract until it is told otherwise; counts calls after registration."""

    def __init__(self) -> None:
        self.override: Any = None
        self.num_calls = -1  # Registering asks for one score.

    def __call__(self, path: str, body: Any) -> Any:
        self.num_calls += 1
        if self.override is not None:
            return self.override(self.num_calls, body) if callable(self.override) else self.override
        return {"rewards": [letters(item["output"]) for item in body["inputs"]], "version": "1"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    async with scripted_server(Letters()) as server:
        yield server


@pytest.fixture
async def gateway(server: ScriptedServer) -> AsyncIterator[FakeGateway]:
    registry = RewardRegistry(entry_points=lambda: ())
    for name in ("letters", "other"):
        options = {"api": "json", "revision": name, **LIMITS}
        await registry.add(RewardSpec(name=name, kind="http", target=server.url, options=options))
    server.answer.num_calls = 0  # type: ignore[attr-defined]
    gateway = build_gateway()
    gateway.parts.scoring = CalibratedScoring(registry, ReferenceCalibrators(MemoryCalibratorStore()))
    yield gateway
    await registry.aclose()


async def ask(gateway: FakeGateway, **fields: Any) -> httpx.Response:
    async with asgi_client(gateway.app) as client:
        return await client.post("/v1/completions", json=BODY | fields)


async def test_the_best_candidate_by_the_servers_rewards_is_the_answer(gateway: FakeGateway) -> None:
    answer = (await ask(gateway)).json()
    (choice,) = answer["choices"]
    assert choice["selection"]["reward"]["raw"] == letters(choice["text"])
    candidates = [rollout for rollout in gateway.log.rollouts if rollout.num_candidates == 6]
    assert len(candidates) == 6
    assert letters(choice["text"]) == max(letters(rollout.output_text) for rollout in candidates)
    assert [rollout.rewards[0].raw for rollout in candidates] == [letters(each.output_text) for each in candidates]


FAULTS: list[tuple[Any, int, str]] = [
    (Scripted(500), 502, "reward_failed"),
    (Scripted(body=b"<html>"), 502, "reward_failed"),
    ({"rewards": [1.0], "version": "1"}, 502, "reward_failed"),
    (lambda n, body: {"rewards": ["x" for _ in body["inputs"]], "version": "1"}, 502, "reward_failed"),
    (lambda n, body: {"rewards": [float("nan") for _ in body["inputs"]], "version": "1"}, 502, "reward_failed"),
    (lambda n, body: {"rewards": [None for _ in body["inputs"]], "version": "1"}, 502, "reward_failed"),
    (Scripted(429, headers={"Retry-After": "60"}), 503, "reward_unavailable"),
    (Scripted(body=b'{"rewards": [], "version": "1"}', is_cut=True), 503, "reward_unavailable"),
    (Scripted(pause_s=1.0), 503, "reward_unavailable"),
]


@pytest.mark.parametrize(("fault", "status", "code"), FAULTS)
@pytest.mark.parametrize("reward", ["letters", {"letters": 0.5, "other": 0.5}])
async def test_a_fault_of_the_server_is_an_error_and_no_reward_is_logged(
    gateway: FakeGateway, server: ScriptedServer, fault: Any, status: int, code: str, reward: Any
) -> None:
    server.answer.override = fault  # type: ignore[attr-defined]
    refused = await ask(gateway, reward=reward)
    assert (refused.status_code, refused.json()["error"]["code"]) == (status, code), refused.text
    assert ("Retry-After" in refused.headers) == (status == 503)
    assert [rollout.rewards for rollout in gateway.log.rollouts if rollout.rewards] == []
    assert server.url not in refused.text


async def test_a_version_that_changes_during_a_request_is_an_error_and_the_next_request_has_the_new_one(
    gateway: FakeGateway, server: ScriptedServer
) -> None:
    def upgraded(number: int, body: Any) -> dict[str, Any]:
        # The first call of the request is the old version's, its next one the new version's.
        return {
            "rewards": [letters(item["output"]) for item in body["inputs"]],
            "version": "1" if number == 1 else "2",
        }

    server.answer.override = upgraded  # type: ignore[attr-defined]
    refused = await ask(gateway)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "reward_changed")
    answer = (await ask(gateway)).json()
    again = (await ask(gateway)).json()
    versions = {each["choices"][0]["selection"]["reward"]["version"] for each in (answer, again)}
    assert len(versions) == 1


async def test_a_server_that_comes_back_is_used_again(gateway: FakeGateway, server: ScriptedServer) -> None:
    server.answer.override = Scripted(503)  # type: ignore[attr-defined]
    assert (await ask(gateway)).status_code == 503
    server.answer.override = None  # type: ignore[attr-defined]
    assert (await ask(gateway)).status_code == 200
