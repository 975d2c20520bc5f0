"""Fetches steering records from an engine, many callers' in one request.

Each request is a call between two decoding steps, during which the engine does not decode; so calls that wait at the
same time are put together.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from trimtab_adapters.contract.records import SteeringRecord

MAX_UIDS = 4096
"""Most uids in one request, as `TakeRequest` and `ReadRequest` have it."""

Fetch = Callable[[Mapping[str, int]], Awaitable[dict[str, SteeringRecord]]]
"""Records by uid, given for each uid the token from which on it is wanted."""


@dataclass(slots=True)
class _Waiting:
    uid: str
    start: int
    outcome: asyncio.Future[SteeringRecord | None]


class RecordFetcher:
    """Coalesces concurrent calls: while one request is under way, the next gathers.

    Args:
        fetch: Makes one request.
    """

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch
        self._waiting: list[_Waiting] = []
        self._worker: asyncio.Task[None] | None = None

    async def fetch(self, starts: Mapping[str, int]) -> dict[str, SteeringRecord]:
        """The records of these uids, each from a token on; unknown ones are left out."""
        loop = asyncio.get_running_loop()
        calls = [_Waiting(uid, start, loop.create_future()) for uid, start in starts.items()]
        self._waiting.extend(calls)
        if calls and (self._worker is None or self._worker.done()):
            self._worker = asyncio.create_task(self._work())
        outcomes = await asyncio.gather(*(call.outcome for call in calls), return_exceptions=True)
        records: dict[str, SteeringRecord] = {}
        for call, outcome in zip(calls, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                raise outcome
            if outcome is not None:
                records[call.uid] = outcome
        return records

    async def aclose(self) -> None:
        """Stop; callers that still wait are cancelled."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        for call in self._waiting:
            call.outcome.cancel()
        self._waiting.clear()

    async def _work(self) -> None:
        while self._waiting:
            batch = self._next_batch()
            try:
                records = await self._fetch({uid: call.start for uid, call in batch.items()})
            except asyncio.CancelledError:
                for call in batch.values():
                    call.outcome.cancel()
                raise
            except Exception as exc:  # noqa: BLE001 not swallowed: each caller gets it
                for call in batch.values():
                    if not call.outcome.done():
                        call.outcome.set_exception(exc)
            else:
                for uid, call in batch.items():
                    if not call.outcome.done():
                        call.outcome.set_result(records.get(uid))

    def _next_batch(self) -> dict[str, _Waiting]:
        """As many as one request may name, each uid once."""
        batch: dict[str, _Waiting] = {}
        later: list[_Waiting] = []
        for call in self._waiting:
            if len(batch) < MAX_UIDS and call.uid not in batch:
                batch[call.uid] = call
            else:
                later.append(call)
        self._waiting = later
        return batch
