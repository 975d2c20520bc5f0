"""A bounded cache in front of a slow question."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from functools import partial
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class SharedLookup(Generic[K, V]):
    """Remembers answers; callers who ask for the same at the same time share one question.

    A caller that gives up does not stop the question that others may wait for. A failure reaches everyone who waits
    and is not remembered.

    Args:
        ask: Finds the answer.
        max_weight: Bound on the weights of all remembered answers; the least recently used go first.
        weigh: Weight of an answer.
    """

    def __init__(
        self, ask: Callable[[K], Awaitable[V]], *, max_weight: int, weigh: Callable[[V], int] = lambda _: 1
    ) -> None:
        self._ask = ask
        self._max_weight = max_weight
        self._weigh = weigh
        self._weight = 0
        self._kept: OrderedDict[K, V] = OrderedDict()
        self._pending: dict[K, asyncio.Task[V]] = {}

    async def get(self, key: K) -> V:
        """The answer. Raises what `ask` raises."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        task = self._pending.get(key)
        if task is None:
            task = self._pending[key] = asyncio.create_task(self._find(key))
            task.add_done_callback(partial(self._finish, key))
        return await asyncio.shield(task)

    async def _find(self, key: K) -> V:
        return await self._ask(key)

    def _finish(self, key: K, task: asyncio.Task[V]) -> None:
        del self._pending[key]
        # Looking at the error marks it as seen: everyone who waited for it may have gone.
        if task.cancelled() or task.exception() is not None:
            return
        value = task.result()
        self._kept[key] = value
        self._weight += self._weigh(value)
        while self._weight > self._max_weight:
            self._weight -= self._weigh(self._kept.popitem(last=False)[1])
