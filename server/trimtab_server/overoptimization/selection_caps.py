"""The caps that are known, and the sentence for a request that goes beyond one."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from trimtab_adapters.contract.errors import StorageError
from trimtab_adapters.contract.selection_cap import SelectionCap
from trimtab_server.storage.base import SelectionCapStore

logger = logging.getLogger(__name__)

MAX_AGE_S = 60.0


class MemorySelectionCapStore:
    """Caps that live as long as the process. A `SelectionCapStore`."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str, str], SelectionCap] = {}

    async def list(self) -> Sequence[SelectionCap]:
        """All of them, newest first."""
        return sorted(self._kept.values(), key=lambda cap: -cap.created_at)

    async def put(self, cap: SelectionCap) -> None:
        """Replace what was stored for the same rewards and base model."""
        self._kept[cap.proxy, cap.gold, cap.base_model] = cap


class SelectionCaps:
    """Caps from their store, read again when they are older than a minute or this process has written one.

    Args:
        store: Where they are kept; other gateways write there too.
        max_age_s: How long what was read is taken for true, in seconds.
        clock: Seconds, monotonic.
    """

    def __init__(
        self, store: SelectionCapStore, *, max_age_s: float = MAX_AGE_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._max_age_s = max_age_s
        self._clock = clock
        self._caps: Sequence[SelectionCap] = ()
        self._read_at: float | None = None
        self._reading = asyncio.Lock()

    async def list(self) -> Sequence[SelectionCap]:
        """All caps as the store has them now, newest first. Raises `StorageError`."""
        return await self._store.list()

    async def put(self, cap: SelectionCap) -> None:
        """Store a cap; requests of this process see it at once, those of others within a minute.

        Raises:
            StorageError: It could not be stored.
        """
        await self._store.put(cap)
        self._read_at = None

    async def warning(self, reward_name_at_version: str, base_model: str, num_candidates: int) -> str | None:
        """What to tell a caller who chooses among this many candidates by this reward; None when there is nothing.

        It never fails: a warning is not worth an answer. When the store cannot be read, what was read last holds.
        """
        await self._refresh()
        beyond = [
            cap
            for cap in self._caps
            if (cap.proxy, cap.base_model) == (reward_name_at_version, base_model)
            and cap.cap is not None
            and num_candidates > cap.cap
        ]
        if not beyond:
            return None
        cap = min(beyond, key=lambda cap: (cap.cap, cap.gold))
        day = datetime.fromtimestamp(cap.created_at, UTC).strftime("%Y-%m-%d")
        return (
            f"{num_candidates} candidates are more than the {cap.cap} up to which choosing by {cap.proxy} was found to "
            f"raise {cap.gold}; beyond that it falls (measured on {cap.num_prompts} prompts, {day})"
        )

    async def _refresh(self) -> None:
        if self._is_fresh():
            return
        async with self._reading:
            if self._is_fresh():
                return
            # Taken before reading, and also when it fails: a store that is down is asked once a minute, not once a
            # request.
            self._read_at = self._clock()
            try:
                self._caps = await self._store.list()
            except StorageError:
                logger.exception("the selection caps cannot be read; those read last are used")

    def _is_fresh(self) -> bool:
        return self._read_at is not None and self._clock() - self._read_at < self._max_age_s
