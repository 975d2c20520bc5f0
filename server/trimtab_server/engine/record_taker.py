"""Takes steering records from an engine, many callers' in one request.

Each take is a call between two decoding steps, during which the engine does not decode; so calls that wait at the same
time are put together.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from trimtab_adapters.contract.records import SteeringRecord

MAX_UIDS = 4096
"""Most uids in one request, as `TakeRequest` has it."""

Take = Callable[[Sequence[str]], Awaitable[dict[str, SteeringRecord]]]


class RecordTaker:
    """Coalesces concurrent takes: while one request is under way, the next gathers."""

    def __init__(self, take: Take) -> None:
        self._take = take
        self._waiting: list[tuple[str, asyncio.Future[SteeringRecord | None]]] = []
        self._worker: asyncio.Task[None] | None = None

    async def take(self, uids: Sequence[str]) -> dict[str, SteeringRecord]:
        """The records of these uids; unknown ones are left out."""
        loop = asyncio.get_running_loop()
        futures: dict[str, asyncio.Future[SteeringRecord | None]] = {uid: loop.create_future() for uid in uids}
        self._waiting.extend(futures.items())
        if futures and (self._worker is None or self._worker.done()):
            self._worker = asyncio.create_task(self._work())
        outcomes = await asyncio.gather(*futures.values(), return_exceptions=True)
        records: dict[str, SteeringRecord] = {}
        for uid, outcome in zip(futures, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                raise outcome
            if outcome is not None:
                records[uid] = outcome
        return records

    async def aclose(self) -> None:
        """Stop; callers that still wait are cancelled."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        for _, future in self._waiting:
            future.cancel()
        self._waiting.clear()

    async def _work(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:MAX_UIDS], self._waiting[MAX_UIDS:]
            try:
                records = await self._take([uid for uid, _ in batch])
            except asyncio.CancelledError:
                for _, future in batch:
                    future.cancel()
                raise
            except Exception as exc:  # noqa: BLE001 not swallowed: each caller gets it
                for _, future in batch:
                    if not future.done():
                        future.set_exception(exc)
            else:
                for uid, future in batch:
                    if not future.done():
                        future.set_result(records.get(uid))
