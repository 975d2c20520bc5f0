"""Which adapter versions an engine holds, how many requests use each, and which one goes when memory is short.

A request pins its versions when it is admitted and keeps them to its last token. A version is loaded in two steps,
prepare (validate in the background) and commit (between two decoding steps), and retired only when no request uses it:
so the engine never has to take a row back whose version is going.

Where the engine has a budget for weights, a request is admitted when all of its versions fit, and takes all of them at
once: a request that waits holds nothing, so requests cannot wait for each other. They are admitted in the order in
which they came, except that one whose versions are all there need not wait for others. So that steady traffic to
loaded versions does not keep everybody else out, a request that has waited for `patience_s` lets them run empty: the
least recently used ones take no new requests until there is room for it.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from trimtab_adapters.contract.engine_api import EngineStatus, RetireReply
from trimtab_adapters.contract.errors import (
    AdapterMemoryFullError,
    EngineError,
    EngineUnavailableError,
    InvalidRequestError,
    TrimtabError,
)
from trimtab_adapters.contract.params import VersionId
from trimtab_server.engine.adapter_memory import AdapterMemory, VersionResidency
from trimtab_server.engine.base import Engine
from trimtab_server.storage.base import AdapterVersion, Catalog

logger = logging.getLogger(__name__)

STATUS_AGE_S = 1.0
"""How old the knowledge of the engine may be. An engine takes far longer to restart, so none can slip through."""
_CONVERGE_WAIT_S = 1.0
_RETRY_AFTER_S = 5
_REFUSED_PAUSE_S = 0.05
_FREED_POLL_S = 0.05


@dataclass(slots=True)
class ResidencyCounters:
    """Sums since the start.

    Attributes:
        loads: Versions that were loaded.
        evictions: Versions that were retired to make room.
        waits: Requests that had to wait for memory.
        refusals: Requests that got none.
    """

    loads: int = 0
    evictions: int = 0
    waits: int = 0
    refusals: int = 0


@dataclass(slots=True, eq=False)
class _Waiter:
    """A request on its way to its versions. `since` is the event loop's time."""

    versions: frozenset[VersionId]
    turn: asyncio.Future[None]
    since: float


class Residency:
    """Keeps an engine's adapter versions in step with what requests need.

    Args:
        engine: The engine.
        catalog: Knows where versions lie and which must stay.
        wait_s: Longest time that a request waits for adapter memory.
        patience_s: How long it waits before versions that others use are run empty for it.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        engine: Engine,
        catalog: Catalog,
        *,
        wait_s: float = 30.0,
        patience_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._catalog = catalog
        self._wait_s = wait_s
        self._patience_s = patience_s
        self._clock = clock
        self._status: EngineStatus | None = None
        self._status_at = float("-inf")
        self._must_resync = True
        self._refreshing: asyncio.Task[EngineStatus] | None = None
        self._memory = AdapterMemory(catalog.is_kept)
        self._loading: dict[VersionId, asyncio.Task[None]] = {}
        self._freeing: dict[VersionId, asyncio.Task[RetireReply]] = {}
        self._retiring: set[VersionId] = set()
        self._unregistered: dict[VersionId, AdapterVersion] = {}
        self._queue: deque[_Waiter] = deque()
        self.counters = ResidencyCounters()

    @property
    def last_status(self) -> EngineStatus | None:
        """What the engine last said of itself; None before it first answered."""
        return self._status

    @property
    def committed(self) -> frozenset[VersionId]:
        """Versions known to be usable."""
        return frozenset(self._memory.usable)

    @property
    def used_bytes(self) -> int:
        """Adapter memory that is taken, or promised to versions that are loading."""
        return self._memory.used_bytes

    @property
    def num_waiting(self) -> int:
        """Requests that wait for adapter memory now."""
        return len(self._queue)

    def in_flight(self, version: VersionId) -> int:
        """Requests that use a version now."""
        return self._memory.in_flight[version]

    def describe(self, version: VersionId) -> VersionResidency:
        """Whether a version is in the engine's memory, as far as this gateway knows."""
        return self._memory.describe(version)

    def forget(self) -> None:
        """Ask the engine again before relying on what it held: something went wrong there."""
        self._must_resync = True
        self._status_at = float("-inf")

    @asynccontextmanager
    async def pin(self, versions: Iterable[VersionId], *, wait_s: float | None = None) -> AsyncIterator[None]:
        """Hold versions usable, all of them or none; loads those that are not, and retires others for them.

        Args:
            versions: Ids of registered versions.
            wait_s: Longest time to wait for adapter memory, when not the usual one.

        Raises:
            AdapterMemoryFullError: Everything else in the engine's memory stayed in use.
            InvalidRequestError: These versions never fit together.
            EngineError: The engine cannot be reached or broke.
            AdapterError: The engine refused a version.
            NotFoundError: A version is not registered.
        """
        wanted = frozenset(versions)
        if wanted:
            await self._acquire(wanted, self._wait_s if wait_s is None else wait_s)
        try:
            yield
        finally:
            self._release(wanted)

    async def ensure(self, version: VersionId) -> None:
        """Load a version if the engine does not hold it, for example before a route is switched to it."""
        async with self.pin([version]):
            pass

    async def try_out(self, adapter: AdapterVersion) -> None:
        """Load a version that need not be registered yet, and let its memory go again unless somebody uses it.

        Raises what `pin` raises.
        """
        self._unregistered[adapter.version] = adapter
        try:
            async with self.pin([adapter.version]):
                pass
        finally:
            self._unregistered.pop(adapter.version, None)
        await self.retire(adapter.version)

    async def retire(self, version: VersionId) -> RetireReply:
        """Free a version as soon as no request uses it.

        Returns:
            The engine's reply when that is now; else `freed` False and the number of requests that still use it.
        """
        if num_users := self._memory.in_flight[version]:
            self._retiring.add(version)
            return RetireReply(version=version, freed=False, active_rows=num_users)
        return await asyncio.shield(self._start_freeing(version))

    async def converge(self) -> None:
        """Load every version that must stay. Raises what `pin` raises, after trying all of them."""
        await self._refresh()
        failures: list[TrimtabError] = []
        for adapter in await self._catalog.active_versions():
            if adapter.version in self._memory.usable:
                continue
            try:
                async with self.pin([adapter.version], wait_s=_CONVERGE_WAIT_S):
                    pass
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
            except AdapterMemoryFullError as exc:
                logger.warning("the engine has no room for all versions that must stay: %s", exc.message)
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
        missing = [a for a in await self._catalog.active_versions() if a.version not in self._memory.usable]
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
        asked_at, before = self._clock(), set(self._memory.usable)
        try:
            status = await self._engine.status()
        except BaseException:
            self.forget()
            raise
        is_same = self._status is not None and status.boot_id == self._status.boot_id
        self._status, self._status_at = status, asked_at
        self._memory.learn(status)
        if must_resync or not is_same:
            # What was committed while the engine answered may be missing in its answer.
            self._resync(status, self._memory.usable - before if is_same else set())
        self._admit()
        return status

    def _resync(self, status: EngineStatus, newer: set[VersionId]) -> None:
        """Believe the engine. Loads under way belong to the old process, or end in the set of usable versions."""
        states = {v.version: v.state for v in status.versions if v.version not in self._freeing}
        self._memory.usable = {version for version, state in states.items() if state == "committed"} | newer
        if self._memory.budget_bytes is None:
            return
        for version, state in states.items():
            # Left behind by a gateway or a call that broke off: nobody would ever free it.
            is_ours = version in self._loading or version in newer or self._memory.in_flight[version] > 0
            if state in ("loading", "prepared", "retiring") and not is_ours:
                self._start_freeing(version)

    async def _acquire(self, versions: frozenset[VersionId], wait_s: float) -> None:
        """Return when all versions are usable and counted in flight; raise and hold nothing otherwise."""
        deadline = asyncio.get_running_loop().time() + wait_s
        while True:
            await self._refresh()
            for version in versions:
                self._memory.suppose(version, (await self._registered(version)).manifest.weight_file_bytes)
            await self._wait_for_turn(versions, deadline)
            try:
                for version in versions:
                    await self._ensure(version)
                return
            except AdapterMemoryFullError:
                # It takes more than its files said. The engine's next status tells how much, and the turn is another.
                self._release(versions)
                if asyncio.get_running_loop().time() + _REFUSED_PAUSE_S >= deadline:
                    self.counters.refusals += 1
                    raise
                await asyncio.sleep(_REFUSED_PAUSE_S)
            except BaseException:
                self._release(versions)
                raise

    async def _registered(self, version: VersionId) -> AdapterVersion:
        return self._unregistered.get(version) or await self._catalog.version(version)

    async def _wait_for_turn(self, versions: frozenset[VersionId], deadline: float) -> None:
        if self._memory.is_impossible(versions):
            self.counters.refusals += 1
            raise InvalidRequestError(
                f"the {len(versions)} adapter versions of this request do not fit together into the engine's adapter "
                f"memory of {self._memory.budget_bytes} bytes",
                param="steering",
                code="adapter_too_large",
            )
        loop = asyncio.get_running_loop()
        waiter = _Waiter(versions, loop.create_future(), loop.time())
        self._queue.append(waiter)
        self._admit()
        if waiter.turn.done():
            return
        if self._memory.budget_bytes is not None:
            self.counters.waits += 1
        timer = loop.call_later(self._patience_s, self._admit)
        try:
            async with asyncio.timeout_at(None if self._memory.budget_bytes is None else deadline):
                await waiter.turn
        except TimeoutError as exc:
            if waiter not in self._queue:
                return  # at the last moment
            self.counters.refusals += 1
            raise AdapterMemoryFullError(
                f"all {self._memory.budget_bytes} bytes of the engine's adapter memory are taken by versions that are "
                "in use, on a route, or pinned; try again later",
                retry_after_s=_RETRY_AFTER_S,
            ) from exc
        except BaseException:
            if waiter not in self._queue:
                self._release(versions)
            raise
        finally:
            timer.cancel()
            if waiter in self._queue:
                self._queue.remove(waiter)
                self._admit()

    def _admit(self) -> None:
        """Let in who fits, first come first served; make room for the first who does not."""
        memory, is_blocked = self._memory, False
        for waiter in list(self._queue):
            if memory.is_claimed(waiter.versions) and not (is_blocked and waiter.versions & memory.draining):
                self._let_in(waiter)
            elif not is_blocked:
                lacking = memory.lacking_bytes(waiter.versions)
                if lacking <= 0 and not waiter.versions & memory.freeing:
                    self._let_in(waiter)
                elif memory.budget_bytes is not None:
                    is_blocked = True
                    self._make_room(waiter, lacking)
        if not is_blocked:
            memory.draining = set()

    def _let_in(self, waiter: _Waiter) -> None:
        self._queue.remove(waiter)
        self._memory.in_flight.update(waiter.versions)
        self._retiring -= waiter.versions  # wanted again
        for version in waiter.versions:
            self._memory.touch(version)
        if not waiter.turn.done():
            waiter.turn.set_result(None)

    def _make_room(self, waiter: _Waiter, num_bytes: int) -> None:
        victims = self._memory.victims(num_bytes, waiter.versions)
        if victims is not None:
            self._memory.draining = set()
            for version in victims:
                logger.info("version %s is retired to make room", version)
                self.counters.evictions += 1
                self._start_freeing(version)
        elif asyncio.get_running_loop().time() - waiter.since >= self._patience_s:
            self._memory.drain_for(num_bytes, waiter.versions)

    async def _ensure(self, version: VersionId) -> None:
        while version not in self._memory.usable:
            task = self._loading.get(version)
            if task is None:
                self._memory.loading.add(version)
                task = self._loading[version] = asyncio.create_task(self._load(version))
                task.add_done_callback(_retrieve)
            # A caller that gives up must not stop the load that others wait for.
            await asyncio.shield(task)

    async def _load(self, version: VersionId) -> None:
        try:
            boot_id = self._status.boot_id if self._status is not None else None
            adapter = await self._registered(version)
            loaded = await self._engine.prepare(version, adapter.path)
            await self._engine.commit(version)
            if self._status is None or self._status.boot_id == boot_id:
                self._memory.usable.add(version)
            self._memory.learn_size(version, loaded.weight_bytes)
            self.counters.loads += 1
        except EngineError:
            self.forget()  # who knows what it holds now
            raise
        finally:
            self._loading.pop(version, None)
            self._memory.loading.discard(version)
            self._admit()

    def _release(self, versions: Iterable[VersionId]) -> None:
        in_flight = self._memory.in_flight
        for version in versions:
            in_flight[version] -= 1
            self._memory.touch(version)
            if in_flight[version] > 0:
                continue
            del in_flight[version]
            if version in self._retiring:
                self._start_freeing(version)
        self._admit()

    def _start_freeing(self, version: VersionId) -> asyncio.Task[RetireReply]:
        self._retiring.discard(version)
        self._memory.usable.discard(version)
        if version not in self._freeing:
            self._memory.freeing.add(version)
            self._freeing[version] = asyncio.create_task(self._retire(version))
            self._freeing[version].add_done_callback(_retrieve)
        return self._freeing[version]

    async def _retire(self, version: VersionId) -> RetireReply:
        try:
            if (loading := self._loading.get(version)) is not None:
                await asyncio.wait({loading})
                self._memory.usable.discard(version)
            reply = await self._engine.retire(version)
            # Rows of requests that were given up a moment ago may be left; their memory is not free before they end.
            while not reply.freed and self._memory.budget_bytes is not None:
                await asyncio.sleep(_FREED_POLL_S)
                reply = await self._engine.retire(version)
            return reply
        except EngineError:
            self.forget()
            raise
        finally:
            self._freeing.pop(version, None)
            self._memory.freeing.discard(version)
            self._admit()


def _retrieve(task: asyncio.Task[object]) -> None:
    """Look at a task's error even if every caller has gone, so that it is not reported as lost."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.debug("a residency task failed: %s", error)
