"""Requests to a route that has a canary."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

from fake_gateway import KIND, PLAIN, FakeGateway, asgi_client, build_gateway, serving
from trimtab_adapters.contract.errors import EngineDiedError
from trimtab_adapters.contract.params import AdapterWeight
from trimtab_server.canary.split import takes_canary
from trimtab_server.canary.watcher import CanaryWatcher
from trimtab_server.engine.base import EngineRequest
from trimtab_server.engine.fake import FakeEngine, Fault
from trimtab_server.storage.base import Canary, RouteRevision

pytestmark = pytest.mark.anyio

CANARY = Canary(PLAIN, (AdapterWeight(name="plain", version=PLAIN, alpha=1.0),), 50.0, 100, 10, 600.0)
IN = next(f"id-{i}" for i in range(99) if takes_canary("kind", 1, f"id-{i}", 50.0))
OUT = next(f"id-{i}" for i in range(99) if not takes_canary("kind", 1, f"id-{i}", 50.0))


class Routes:
    """The catalog's routes; nothing ends here."""

    def __init__(self) -> None:
        self.gateway: FakeGateway | None = None

    async def routes(self) -> Sequence[RouteRevision]:
        assert self.gateway is not None
        return await self.gateway.catalog.routes()

    async def end_canary(self, route: str, revision: int, *, is_promoted: bool, comment: str) -> RouteRevision:
        raise AssertionError("not in these tests")


def fault_for(request: EngineRequest) -> Fault | None:
    """The engine dies of the prompt `die`."""
    is_asked = request.body.get("prompt") == "die"
    return Fault(EngineDiedError("gone")) if is_asked else None


@pytest.fixture
async def gateway(anyio_backend: str) -> FakeGateway:
    routes = Routes()
    watcher = CanaryWatcher(routes)
    routes.gateway = build_gateway(fake=FakeEngine(fault_for=fault_for), parts={"canaries": watcher})
    revisions = routes.gateway.catalog.revisions
    revisions["kind"] = replace(revisions["kind"], canary=CANARY)
    return routes.gateway


@pytest.fixture
async def client(gateway: FakeGateway) -> AsyncIterator[httpx.AsyncClient]:
    async with asgi_client(gateway.app) as client:
        yield client


async def ask(client: httpx.AsyncClient, request_id: str, status: int = 200, **body: Any) -> Any:
    body = {"model": "kind", "prompt": "Hi", "max_tokens": 3, **body}
    response = await client.post("/v1/completions", json=body, headers={"x-request-id": request_id})
    assert response.status_code == status, response.text
    return response


def counted(gateway: FakeGateway) -> tuple[tuple[int, int], tuple[int, int]]:
    """Answers and errors of the canary and of the rest."""
    watcher = gateway.parts.canaries
    assert isinstance(watcher, CanaryWatcher)
    found = watcher.outcomes(gateway.catalog.revisions["kind"])
    return (found.canary.num_answers, found.canary.num_errors), (found.stable.num_answers, found.stable.num_errors)


@pytest.mark.parametrize(("request_id", "is_canary"), [(IN, True), (OUT, False)])
async def test_the_answer_and_the_log_say_on_which_side_a_request_is(
    client: httpx.AsyncClient, gateway: FakeGateway, request_id: str, is_canary: bool
) -> None:
    answer = (await ask(client, request_id)).json()
    version = PLAIN if is_canary else KIND
    said = {"revision": 1, "version": PLAIN, "percent": 50.0, "is_canary": is_canary}
    assert answer["canary"] == said
    assert [adapter["version"] for adapter in answer["steering"]["adapters"]] == [version]
    (rollout,) = gateway.log.rollouts
    assert rollout.metadata["canary"] == said
    assert [weight.version for weight in rollout.steering] == [version]
    assert counted(gateway) == (((1, 0), (0, 0)) if is_canary else ((0, 0), (1, 0)))


async def test_a_stream_says_it_too(client: httpx.AsyncClient, gateway: FakeGateway) -> None:
    body = (await ask(client, IN, stream=True)).text
    assert '"is_canary":true' in body.replace(" ", "")
    assert counted(gateway) == ((1, 0), (0, 0))


async def test_adapters_of_the_request_are_no_canary(client: httpx.AsyncClient, gateway: FakeGateway) -> None:
    answer = (await ask(client, IN, steering={"adapters": [{"name": "kind"}]})).json()
    assert "canary" not in answer
    assert counted(gateway) == ((0, 0), (0, 0))


async def test_other_models_have_none(client: httpx.AsyncClient, gateway: FakeGateway) -> None:
    assert "canary" not in (await ask(client, IN, model="base")).json()
    assert "canary" not in gateway.log.rollouts[0].metadata


async def test_faults_of_the_engine_are_counted_and_mistakes_of_the_caller_are_not(
    client: httpx.AsyncClient, gateway: FakeGateway
) -> None:
    await ask(client, IN, 503, prompt="die")
    await ask(client, OUT, 503, prompt="die")
    await ask(client, IN, 400, max_tokens=-1)
    await ask(client, IN, 400, n=3, best_of=2)
    assert counted(gateway) == ((0, 1), (0, 1))


async def test_the_routes_reward_is_what_both_sides_are_compared_by(
    client: httpx.AsyncClient, gateway: FakeGateway
) -> None:
    gateway.scoring.rewards["length"] = lambda prompt, output: float(len(output))
    revisions = gateway.catalog.revisions
    revisions["kind"] = replace(revisions["kind"], best_of=2, reward="length")
    answer = (await ask(client, IN)).json()
    watcher = gateway.parts.canaries
    assert isinstance(watcher, CanaryWatcher)
    found = watcher.outcomes(revisions["kind"]).canary
    assert (found.num_rewards, found.mean) == (1, float(len(answer["choices"][0]["text"])))


async def test_the_official_client_reads_such_answers(gateway: FakeGateway) -> None:
    async with (
        serving(gateway.app) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client,
    ):
        answer = await client.completions.create(
            model="kind", prompt="Hi", max_tokens=2, extra_headers={"x-request-id": IN}
        )
    assert answer.choices[0].text
    assert answer.model_extra is not None
    assert answer.model_extra["canary"]["is_canary"] is True
