"""Which adapter versions an engine holds, and how many requests use each.

A request pins its versions when it is admitted and keeps them to its last token. A version is loaded in two steps,
prepare (validate in the background) and commit (between two decoding steps), and retired when nobody uses it.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

from trimtab_adapters.contract.engine_api import EngineStatus, RetireReply
from trimtab_adapters.contract.errors import EngineUnavailableError, TrimtabError
from trimtab_adapters.contract.params import VersionId
from trimtab_server.engine.base import Engine
from trimtab_server.storage.base import Catalog

logger = logging.getLogger(__name__)

STATUS_AGE_S = 1.0
"""How old the knowledge of the engine may be. An engine takes far longer to restart, so none can slip through."""


class Residency:
    """Keeps an engine's adapter versions in step with what requests need.

    Args:
        engine: The engine.
        catalog: Knows where versions lie and which are active.
        clock: Monotonic seconds.
    """

    def __init__(self, engine: Engine, catalog: Catalog, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._catalog = catalog
        self._clock = clock
        self._status: EngineStatus | None = None
        self._status_at = float("-inf")
        self._must_resync = True
        self._refreshing: asyncio.Task[EngineStatus] | None = None
        self._committed: set[VersionId] = set()
        self._loading: dict[VersionId, asyncio.Task[None]] = {}
        self._freeing: dict[VersionId, asyncio.Task[RetireReply]] = {}
        self._retiring: set[VersionId] = set()
        self._in_flight: Counter[VersionId] = Counter()

    @property
    def last_status(self) -> EngineStatus | None:
        """What the engine last said of itself; None before it first answered."""
        return self._status

    @property
    def committed(self) -> frozenset[VersionId]:
        """Versions known to be usable."""
        return frozenset(self._committed)

    def in_flight(self, version: VersionId) -> int:
        """Requests that use a version now."""
        return self._in_flight[version]

    def forget(self) -> None:
        """Ask the engine again before relying on what it held: something went wrong there."""
        self._must_resync = True
        self._status_at = float("-inf")

    @asynccontextmanager
    async def pin(self, versions: Iterable[VersionId]) -> AsyncIterator[None]:
        """Hold versions usable; loads those that are not.

        Raises:
            EngineError: The engine cannot be reached or broke.
            AdapterError: The engine refused a version.
            NotFoundError: A version is not registered.
        """
        pinned = set(versions)
        self._in_flight.update(pinned)
        self._retiring -= pinned  # wanted again
        try:
            if pinned:
                await self._refresh()
                for version in pinned:
                    await self._ensure(version)
            yield
        finally:
            for version in pinned:
                self._unpin(version)

    async def ensure(self, version: VersionId) -> None:
        """Load a version if the engine does not hold it, for example before a route is switched to it."""
        async with self.pin([version]):
            pass

    async def try_out(self, version: VersionId, path: str) -> None:
        """Let the engine load and validate a version, and free it again; one that it holds already is known to be good.

        A version that was retired may be registered again while the last of its requests still run, so what nobody
        uses is told here, and whoever wants the version meanwhile waits until it is freed.

        Raises:
            EngineError: The engine cannot be reached or broke.
            AdapterError: The engine refused the version.
        """
        await self._refresh()
        while version not in self._committed:
            busy = self._freeing.get(version) or self._loading.get(version)
            if busy is not None:
                await asyncio.wait({busy})
                continue
            if self._in_flight[version]:
                await self._ensure(version)
                return
            self._freeing[version] = asyncio.create_task(self._load_and_free(version, path))
            self._freeing[version].add_done_callback(_retrieve)
            await asyncio.shield(self._freeing[version])
            return

    async def retire(self, version: VersionId) -> RetireReply:
        """Free a version as soon as no request uses it.

        Returns:
            The engine's reply when that is now; else `freed` False and the number of requests that still use it.
        """
        if self._in_flight[version]:
            self._retiring.add(version)
            return RetireReply(version=version, freed=False, active_rows=self._in_flight[version])
        return await self._free(version)

    async def converge(self) -> None:
        """Load every version that a route uses. Raises what `pin` raises, after trying all of them."""
        await self._refresh()
        failures: list[TrimtabError] = []
        for adapter in await self._catalog.active_versions():
            try:
                await self._ensure(adapter.version)
            except TrimtabError as exc:
                logger.error("version %s of %s cannot be loaded: %s", adapter.version, adapter.name, exc.message)
                failures.append(exc)
        if failures:
            raise failures[0]

    async def keep_converged(self, interval_s: float = 2.0) -> None:
        """Converge for ever: after start, after the engine restarts, after routes change."""
        was_up = True
        while True:
            try:
                await self.converge()
                was_up = True
            except EngineUnavailableError as exc:
                if was_up:
                    logger.warning("the engine is not available: %s", exc.message)
                was_up = False
            except TrimtabError as exc:
                logger.warning("the engine does not hold all active versions: %s", exc.message)
            await asyncio.sleep(interval_s)

    async def check_ready(self) -> None:
        """Raises `EngineUnavailableError` until the engine answers and holds all active versions."""
        await self._refresh()
        missing = [a for a in await self._catalog.active_versions() if a.version not in self._committed]
        if missing:
            names = ", ".join(f"{adapter.name}@{adapter.version}" for adapter in missing)
            raise EngineUnavailableError(f"adapter versions are still being loaded: {names}", retry_after_s=1)

    async def aclose(self) -> None:
        """Stop what is under way."""
        tasks = [*self._loading.values(), *self._freeing.values(), *([self._refreshing] if self._refreshing else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _refresh(self) -> None:
        """Know the engine's boot id, not older than `STATUS_AGE_S`; concurrent callers share one question."""
        if self._clock() - self._status_at < STATUS_AGE_S and not self._must_resync:
            return
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._ask())
            self._refreshing.add_done_callback(_retrieve)
        await asyncio.shield(self._refreshing)

    async def _ask(self) -> EngineStatus:
        must_resync, self._must_resync = self._must_resync, False
        asked_at = self._clock()
        try:
            status = await self._engine.status()
        except BaseException:
            self.forget()
            raise
        if must_resync or self._status is None or status.boot_id != self._status.boot_id:
            # Loads under way belong to the old process, or end in the set below.
            self._committed = {v.version for v in status.versions if v.state == "committed"}
        self._status, self._status_at = status, asked_at
        return status

    async def _ensure(self, version: VersionId) -> None:
        while version not in self._committed:
            if (freeing := self._freeing.get(version)) is not None:
                await asyncio.wait({freeing})
                continue
            task = self._loading.get(version)
            if task is None:
                task = self._loading[version] = asyncio.create_task(self._load(version))
                task.add_done_callback(_retrieve)
            # A caller that gives up must not stop the load that others wait for.
            await asyncio.shield(task)

    async def _load(self, version: VersionId) -> None:
        try:
            boot_id = self._status.boot_id if self._status is not None else None
            adapter = await self._catalog.version(version)
            await self._engine.prepare(version, adapter.path)
            await self._engine.commit(version)
            if self._status is None or self._status.boot_id == boot_id:
                self._committed.add(version)
        finally:
            self._loading.pop(version, None)

    def _unpin(self, version: VersionId) -> None:
        self._in_flight[version] -= 1
        if self._in_flight[version] > 0:
            return
        del self._in_flight[version]
        if version in self._retiring:
            self._start_freeing(version)

    async def _free(self, version: VersionId) -> RetireReply:
        return await asyncio.shield(self._start_freeing(version))

    def _start_freeing(self, version: VersionId) -> asyncio.Task[RetireReply]:
        self._retiring.discard(version)
        self._committed.discard(version)
        if version not in self._freeing:
            self._freeing[version] = asyncio.create_task(self._retire(version))
            self._freeing[version].add_done_callback(_retrieve)
        return self._freeing[version]

    async def _load_and_free(self, version: VersionId, path: str) -> RetireReply:
        try:
            await self._engine.prepare(version, path)
            return await self._engine.retire(version)
        finally:
            self._freeing.pop(version, None)

    async def _retire(self, version: VersionId) -> RetireReply:
        try:
            if (loading := self._loading.get(version)) is not None:
                await asyncio.wait({loading})
                self._committed.discard(version)
            return await self._engine.retire(version)
        finally:
            self._freeing.pop(version, None)


def _retrieve(task: asyncio.Task[object]) -> None:
    """Look at a task's error even if every caller has gone, so that it is not reported as lost."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.debug("a residency task failed: %s", error)
