"""A thread that runs one thing at a time for an event loop and never keeps the process from ending."""

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")

_Done = Callable[[Any], None]
_Work = SimpleQueue[tuple[Callable[[], Any], asyncio.AbstractEventLoop, _Done] | None]


class WorkerThread:
    """One thread, started at its first use; it ends with this object.

    asyncio's own pool would do, but for two things: a call that hangs would hold one of its few threads, which the
    gateway needs for everything else, and the process could not end before it. It is the same thread each time,
    because native libraries keep threads of their own for each thread that calls them.

    Args:
        name: Of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._work: _Work = SimpleQueue()
        self._is_started = False
        self._is_free = asyncio.Lock()

    async def run(self, function: Callable[[], T]) -> T:
        """Run it when the thread is free. Cancelling the caller does not stop what runs; the next call waits for it.

        Args:
            function: Must not raise.
        """
        await self._is_free.acquire()
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()

        def done(outcome: T) -> None:
            self._is_free.release()
            if not result.done():
                result.set_result(outcome)

        if not self._is_started:
            threading.Thread(target=_serve, args=(self._work,), name=self._name, daemon=True).start()
            weakref.finalize(self, self._work.put, None)
            self._is_started = True
        self._work.put((function, loop, done))
        return await result


def _serve(work: _Work) -> None:
    """The thread. It holds no reference to its `WorkerThread` while it waits."""
    while (item := work.get()) is not None:
        function, loop, done = item
        del item
        outcome = function()
        with contextlib.suppress(RuntimeError):  # The loop has ended meanwhile.
            loop.call_soon_threadsafe(done, outcome)
        del function, loop, done, outcome
