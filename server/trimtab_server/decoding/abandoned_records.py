"""Records that nobody will ask for: of candidates whose request failed, or whose client went away."""

import asyncio
import logging
from collections.abc import Iterable

from trimtab_adapters.contract.errors import EngineError
from trimtab_server.engine.base import Engine, EngineRequest

logger = logging.getLogger(__name__)

_DELAY_S = 1.0
"""How long an engine may need to notice that a candidate was given up; until then its record may grow again."""
_MAX_UIDS = 4096


class AbandonedRecords:
    """Takes such records, in the background, so that the engine does not keep them.

    Args:
        engine: Where they are.
        delay_s: How long after a candidate was given up.
    """

    def __init__(self, engine: Engine, *, delay_s: float = _DELAY_S) -> None:
        self._engine = engine
        self._delay_s = delay_s
        self._waiting: list[str] = []
        self._task: asyncio.Task[None] | None = None

    def forget(self, requests: Iterable[EngineRequest]) -> None:
        """Nobody will ask for the records of these."""
        self._waiting += [r.steering.uid for r in requests if r.steering is not None and r.steering.record]
        if self._waiting and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._take())

    async def aclose(self) -> None:
        """Stop; what is left stays in the engine until its own bound."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _take(self) -> None:
        while self._waiting:
            await asyncio.sleep(self._delay_s)
            uids, self._waiting = self._waiting[:_MAX_UIDS], self._waiting[_MAX_UIDS:]
            try:
                await self._engine.take_records(uids)
            except EngineError as exc:
                logger.debug("the records of %d abandoned candidates stay in the engine: %s", len(uids), exc.message)
