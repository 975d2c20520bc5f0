"""`admin.adapters.promote`: what it sends, and what it makes of the answer."""

import asyncio
import json
from typing import Any

import httpx

from trimtab_client import AsyncClient, Client

CANARY = {"version": "b" * 16, "percent": 5.0, "steering": []}
ANSWER = {"route": "r", "revision": 2, "steering": [], "canary": CANARY}
SETTINGS: dict[str, Any] = {"percent": 5.0, "num_answers": 80, "min_answers": 8, "timeout_s": 60.0, "comment": "try"}


class Gateway:
    def __init__(self) -> None:
        self.bodies: list[Any] = []

    def respond(self, request: httpx.Request) -> httpx.Response:
        assert (request.method, request.url.path) == ("POST", "/admin/routes/r/promote")
        self.bodies.append(json.loads(request.content))
        return httpx.Response(200, json=ANSWER)

    async def respond_later(self, request: httpx.Request) -> httpx.Response:
        return self.respond(request)


def test_what_is_left_out_is_the_gateways_to_decide() -> None:
    gateway = Gateway()
    with Client(transport=httpx.MockTransport(gateway.respond)) as client:
        revision = client.admin.adapters.promote(route="r", adapter="kind")
        client.admin.adapters.promote(route="r", adapter="kind", version="b" * 16, alpha=0.5, force=True, **SETTINGS)
    assert (revision.revision, revision.canary) == (2, CANARY)
    assert gateway.bodies == [
        {"adapter": "kind", "force": False},
        {"adapter": "kind", "version": "b" * 16, "alpha": 0.5, "force": True, **SETTINGS},
    ]


def test_the_asynchronous_client_sends_the_same() -> None:
    gateway = Gateway()

    async def promote() -> Any:
        async with AsyncClient(transport=httpx.MockTransport(gateway.respond_later)) as client:
            return await client.admin.adapters.promote(route="r", adapter="kind", force=True, **SETTINGS)

    assert asyncio.run(promote()).canary == CANARY
    assert gateway.bodies == [{"adapter": "kind", "force": True, **SETTINGS}]
