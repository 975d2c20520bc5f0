import asyncio

import httpx
from typing_extensions import override

from trimtab_server.engine.sharded_transport import ShardedTransport
from trimtab_server.engine.vllm_http import build_engine_client


def test_requests_go_to_the_shards_in_turn_and_all_are_closed() -> None:
    seen: list[int] = []
    closed: list[int] = []

    class Shard(httpx.AsyncBaseTransport):
        def __init__(self, number: int) -> None:
            self.number = number

        @override
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            seen.append(self.number)
            return httpx.Response(200, text=str(request.url))

        @override
        async def aclose(self) -> None:
            closed.append(self.number)

    async def scenario() -> None:
        async with httpx.AsyncClient(transport=ShardedTransport([Shard(n) for n in range(3)])) as client:
            for _ in range(7):
                assert (await client.get("http://engine/x")).text == "http://engine/x"

    asyncio.run(scenario())
    assert seen == [0, 1, 2, 0, 1, 2, 0]
    assert closed == [0, 1, 2]


def test_the_engine_client_keeps_its_key_and_uses_no_proxy() -> None:
    async def scenario() -> None:
        async with build_engine_client("secret") as client:
            assert client.headers["authorization"] == "Bearer secret"
            assert client.trust_env is False

    asyncio.run(scenario())
