"""One engine request per candidate, all at the same time; if one fails, the others stop."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import cast

from trimtab_server.engine.base import Candidate, Engine, EngineDelta, EngineRequest


async def generate_all(engine: Engine, requests: Sequence[EngineRequest]) -> list[Candidate]:
    """All candidates, in the order of the requests.

    The first error cancels the rest, which aborts their work in the engine, and is raised.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(engine.generate(request)) for request in requests]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


class MergedStream:
    """The deltas of several candidates, in the order in which they arrive.

    `next()` may be called from different tasks, one at a time. `aclose()` aborts what still runs.
    """

    def __init__(self, engine: Engine, requests: Sequence[EngineRequest]) -> None:
        # Bounded: when the client reads slowly, the engine's connections fill up and nothing piles up here.
        self._queue: asyncio.Queue[tuple[int, EngineDelta] | BaseException | None] = asyncio.Queue(2 * len(requests))
        self._num_open = len(requests)
        self._tasks = [asyncio.create_task(self._pump(engine, i, request)) for i, request in enumerate(requests)]

    async def next(self) -> tuple[int, EngineDelta] | None:
        """Index of the request and its next delta; None at the end of all. Raises the first error of any."""
        while self._num_open:
            item = await self._queue.get()
            if isinstance(item, BaseException):
                await self.aclose()
                raise item
            if item is not None:
                return item
            self._num_open -= 1
        return None

    async def aclose(self) -> None:
        """Abort what still runs."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _pump(self, engine: Engine, index: int, request: EngineRequest) -> None:
        try:
            async with aclosing(cast("AsyncGenerator[EngineDelta, None]", engine.stream(request))) as deltas:
                async for delta in deltas:
                    await self._queue.put((index, delta))
        except Exception as exc:  # noqa: BLE001 not swallowed: the reader raises it
            await self._queue.put(exc)
        else:
            await self._queue.put(None)
