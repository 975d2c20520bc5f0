"""What tests of strategies share: an engine whose candidates grow in step, and all candidates of a request."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import httpx
from typing_extensions import override

from trimtab_server.engine.base import EngineDelta, EngineRequest
from trimtab_server.engine.fake import FakeEngine

STOPS = [" river", " stone", " cloud"]
"""Words at which the fake engine's candidates end, so that they have different lengths."""


class SteppingEngine(FakeEngine):
    """Candidates grow by one token a turn of the event loop, as in a batch; `slow` ones take `pause` turns."""

    slow: frozenset[int] = frozenset()
    pause = 1

    @override
    async def raw_stream(self, request: EngineRequest) -> AsyncGenerator[EngineDelta, None]:
        turns = self.pause if int(request.request_id.rpartition("-")[2]) in self.slow else 1
        async with aclosing(super().raw_stream(request)) as deltas:
            async for delta in deltas:
                yield delta
                for _ in range(turns):
                    await asyncio.sleep(0)


@dataclass(frozen=True)
class Known:
    """One candidate of a seeded request, as it is when nothing stops it."""

    index: int
    text: str
    tokens: list[str]
    finish_reason: str

    @property
    def length(self) -> int:
        return len(self.tokens)


async def post(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post("/v1/completions", json={"model": "base", "prompt": "Hi", **body})


async def answer(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await post(client, **body)
    assert response.status_code == 200, response.text
    data: dict[str, Any] = response.json()
    return data


async def all_candidates(client: httpx.AsyncClient, num: int, **body: Any) -> list[Known]:
    """The candidates that a request with the same seed draws from, in the order of their numbers."""
    data = await answer(client, n=num, logprobs=0, **body)
    return [
        Known(choice["index"], choice["text"], choice["logprobs"]["tokens"], choice["finish_reason"])
        for choice in data["choices"]
    ]


def chosen_text(data: dict[str, Any]) -> str:
    text: str = data["choices"][0]["text"]
    return text


def states(data: dict[str, Any]) -> dict[int, str]:
    return {candidate["index"]: candidate["state"] for candidate in data["candidates"]}
