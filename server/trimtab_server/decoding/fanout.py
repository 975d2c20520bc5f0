"""All candidates at the same time; if one fails, the others stop.

Candidates that differ by their seeds alone share one request to the engine. Steered ones have a record each, so each is
a request of its own.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Generic, TypeVar

from trimtab_adapters.contract.errors import EngineRequestError
from trimtab_server.engine.base import Candidate, Engine, EngineRequest

D = TypeVar("D")

MAX_GROUP = 64
"""Most candidates of one request to the engine: its answer comes whole, and it waits for as many slots."""


async def generate_all(engine: Engine, requests: Sequence[EngineRequest]) -> list[Candidate]:
    """All candidates, in the order of the requests.

    The first error cancels the rest, which aborts their work in the engine, and is raised.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_generate(engine, members)) for members in groups(requests)]
    except BaseExceptionGroup as failures:
        raise _first(failures) from None
    return [candidate for task in tasks for candidate in task.result()]


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    first = failures.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


def groups(requests: Sequence[EngineRequest]) -> list[list[EngineRequest]]:
    """The requests in order, those together that the engine can answer as one."""
    found: list[list[EngineRequest]] = []
    for request in requests:
        if found and len(found[-1]) < MAX_GROUP and request.is_next_of(found[-1][-1]):
            found[-1].append(request)
        else:
            found.append([request])
    return found


async def _generate(engine: Engine, members: Sequence[EngineRequest]) -> list[Candidate]:
    if len(members) > 1:
        try:
            return await engine.generate_group(members)
        except EngineRequestError as exc:
            if exc.engine_status != 400:
                raise
        # Perhaps it only minds that they are many, as where the model's own default is greedy; else each says why.
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(engine.generate(member)) for member in members]
        return [task.result() for task in tasks]
    return [await engine.generate(members[0])]


class MergedStream(Generic[D]):
    """The deltas of several candidates, in the order in which they arrive.

    `next()` may be called from different tasks, one at a time. `aclose()` aborts what still runs.

    Args:
        stream: The deltas of one candidate; closing it aborts the candidate.
        requests: The candidates.
    """

    def __init__(
        self, stream: Callable[[EngineRequest], AsyncGenerator[D, None]], requests: Sequence[EngineRequest]
    ) -> None:
        # Bounded: when the client reads slowly, the engine's connections fill up and nothing piles up here.
        self._queue: asyncio.Queue[tuple[int, D] | BaseException | None] = asyncio.Queue(2 * len(requests))
        self._num_open = len(requests)
        self._tasks = [asyncio.create_task(self._pump(stream, i, request)) for i, request in enumerate(requests)]

    async def next(self) -> tuple[int, D] | None:
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

    async def _pump(
        self, stream: Callable[[EngineRequest], AsyncGenerator[D, None]], index: int, request: EngineRequest
    ) -> None:
        try:
            async with aclosing(stream(request)) as deltas:
                async for delta in deltas:
                    await self._queue.put((index, delta))
        except Exception as exc:  # noqa: BLE001 not swallowed: the reader raises it
            await self._queue.put(exc)
        else:
            await self._queue.put(None)
