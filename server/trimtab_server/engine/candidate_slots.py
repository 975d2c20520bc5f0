"""A bound on the candidates in an engine at the same time."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager


class CandidateSlots:
    """Slots that are taken several at a time, first come, first served.

    Args:
        num_slots: Candidates in the engine at the same time, at least 1.
    """

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._slots = asyncio.Semaphore(num_slots)
        # Only one waits with a part of what it needs; two of them could wait for each other for ever.
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def taken(self, num: int) -> AsyncGenerator[None, None]:
        """Hold slots for so many candidates; all of them for a group that is larger than the bound."""
        num_held = 0
        try:
            async with self._turn:
                while num_held < min(num, self._num_slots):
                    await self._slots.acquire()
                    num_held += 1
            yield
        finally:
            for _ in range(num_held):
                self._slots.release()
