"""Many small connection pools in place of one large one.

httpcore's pool walks over all of its connections, for each of them again counting the idle ones, whenever a request
begins or ends (httpcore 1.0, `_assign_requests_to_connections`). With the hundreds of connections that a gateway keeps
to its engine that took half of its time. Pools of a few connections each cost next to nothing.
"""

import itertools
from collections.abc import Sequence

import httpx
from typing_extensions import override


class ShardedTransport(httpx.AsyncBaseTransport):
    """Hands each request to the next of several transports in turn.

    Args:
        shards: The transports; closed with this one.
    """

    def __init__(self, shards: Sequence[httpx.AsyncBaseTransport]) -> None:
        self._shards = tuple(shards)
        self._next = itertools.cycle(self._shards)

    @override
    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await next(self._next).handle_async_request(request)

    @override
    async def aclose(self) -> None:
        for shard in self._shards:
            await shard.aclose()
