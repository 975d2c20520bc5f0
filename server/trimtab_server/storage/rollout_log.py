"""The rollout log: through the local spool into the database, losing nothing that was acknowledged."""

import asyncio
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import anyio.to_thread
from anyio import CapacityLimiter

from trimtab_adapters.contract.errors import StorageError
from trimtab_adapters.contract.records import Rollout
from trimtab_server.storage.database import Database, RefusedDataError
from trimtab_server.storage.rollouts import insert_rollouts
from trimtab_server.storage.spool import Spool, SpoolPosition

logger = logging.getLogger(__name__)

T = TypeVar("T")
RolloutMode = Literal["off", "async", "durable"]

REJECTED_FILE = "rejected.jsonl"
_BATCH_RECORDS = 256
_MAX_WAITING_BYTES = 64 << 20
_MAX_BACKOFF_S = 30.0


@dataclass(slots=True)
class _Waiting:
    """Records that are about to be written, and who waits for that."""

    payloads: list[bytes]
    written: asyncio.Future[None]


class SpooledRolloutLog:
    """A `RolloutLog` that appends to the spool and moves records to the database in the background.

    `durable`: `append` returns when the records are flushed to the disk; callers at the same time share one flush.
    `async`: it returns at once unless 64 MiB wait; records reach the operating system soon after and the disk with the
    database. `off`: it does nothing.

    A record that the database refuses for its content goes to `rejected.jsonl` beside the spool, so that it does not
    hold up the others. While the database is away, records stay in the spool.

    Attributes:
        appended: Records written to the spool by this process.
        recovered: Records found in the spool at start.
        drained: Records moved to the database.
        rejected: Records that the database refused.
        lost: Records of `async` mode that could not be written; logged as errors.

    Args:
        database: Migrated.
        directory: The spool's own.
        mode: See above.
        segment_bytes: Size of the spool's files.
        linger_s: How long the drainer lets records gather, in seconds.
    """

    def __init__(
        self,
        database: Database,
        directory: Path,
        mode: RolloutMode = "durable",
        *,
        segment_bytes: int = 8 << 20,
        linger_s: float = 0.05,
    ) -> None:
        self.mode = mode
        self.appended = self.recovered = self.drained = self.rejected = self.lost = 0
        self._database = database
        self._spool = Spool(directory, segment_bytes=segment_bytes)
        self._rejected_path = directory / REJECTED_FILE
        self._linger_s = linger_s
        self._waiting: list[_Waiting] = []
        self._waiting_bytes = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._write_wanted = asyncio.Event()
        self._has_room = asyncio.Event()
        self._drain_wanted = asyncio.Event()
        self._stopping = asyncio.Event()
        self._drain_lock = asyncio.Lock()
        self._threads = CapacityLimiter(2)

    @property
    def pending(self) -> int:
        """Records in the spool that are not yet in the database."""
        return self.appended + self.recovered - self.drained - self.rejected

    async def start(self) -> None:
        """Take up what an earlier process left, and begin.

        Raises:
            StorageError: The spool cannot be used.
        """
        self.recovered = await self._in_thread(self._spool.open)
        if self.recovered:
            logger.info("%d rollouts of an earlier run wait in the spool", self.recovered)
            self._drain_wanted.set()
        self._tasks = [asyncio.create_task(self._write_for_ever()), asyncio.create_task(self._drain_for_ever())]

    async def append(self, rollouts: Sequence[Rollout]) -> None:
        """Log rollouts.

        Raises:
            StorageError: They are not logged: the disk is full or failing, or the log is not running.
        """
        if self.mode == "off" or not rollouts:
            return
        if not self._tasks or self._tasks[0].done() or self._stopping.is_set():
            raise StorageError("the rollout log is not running")
        payloads = _encode(rollouts)
        waiting = _Waiting(payloads, asyncio.get_running_loop().create_future())
        while self.mode == "async" and self._waiting_bytes > _MAX_WAITING_BYTES:
            self._has_room.clear()
            await self._has_room.wait()
        self._waiting.append(waiting)
        self._waiting_bytes += sum(map(len, payloads))
        self._write_wanted.set()
        if self.mode == "durable":
            await waiting.written

    async def flush(self) -> None:
        """Return when every record acknowledged so far is in the database.

        Raises:
            StorageError: It could not be moved there; it stays in the spool.
        """
        if not self._tasks:
            return
        await asyncio.gather(*(waiting.written for waiting in self._waiting), return_exceptions=True)
        # Shielded: a caller that goes away must not let two threads move the same records.
        draining = asyncio.create_task(self._drain(self._spool.end))
        draining.add_done_callback(_retrieve)
        await asyncio.shield(draining)

    async def aclose(self) -> None:
        """Write and drain what waits, and stop. What the database does not take stays in the spool."""
        if not self._tasks:
            return
        self._stopping.set()
        self._write_wanted.set()
        self._drain_wanted.set()
        await asyncio.gather(*self._tasks)
        self._tasks = []
        try:
            await self._drain(self._spool.end)
        except StorageError as exc:
            logger.warning("%d rollouts stay in the spool until the next start: %s", self.pending, exc.message)
        await self._in_thread(self._spool.close)

    async def _write_for_ever(self) -> None:
        try:
            while not (self._stopping.is_set() and not self._waiting):
                await self._write_wanted.wait()
                self._write_wanted.clear()
                while self._waiting:
                    await self._write_waiting()
        finally:
            for waiting in self._waiting:  # only after a programming error: nobody may wait for ever
                if not waiting.written.done():
                    waiting.written.set_exception(StorageError("the rollout log has stopped"))

    async def _write_waiting(self) -> None:
        """Write all that waits, with one flush. What comes meanwhile is the next group."""
        group = list(self._waiting)
        payloads = [payload for waiting in group for payload in waiting.payloads]
        error: StorageError | None = None
        try:
            await self._in_thread(lambda: self._spool.append(payloads, sync=self.mode == "durable"))
        except StorageError as exc:
            error = exc
        if error is None:
            self.appended += len(payloads)
            self._drain_wanted.set()
        elif self.mode == "async":
            self.lost += len(payloads)
            logger.error("%d rollouts are lost: %s", len(payloads), error.message)
        # Only now, so that `flush` sees what is being written.
        del self._waiting[: len(group)]
        self._waiting_bytes -= sum(map(len, payloads))
        self._has_room.set()
        for waiting in group:
            if waiting.written.cancelled():
                continue  # the caller went away; the record is logged all the same
            if error is None or self.mode == "async":
                waiting.written.set_result(None)
            else:
                waiting.written.set_exception(StorageError(error.message))

    async def _drain_for_ever(self) -> None:
        backoff_s = 1.0
        while not self._stopping.is_set():
            await self._drain_wanted.wait()
            await self._pause(self._linger_s)
            self._drain_wanted.clear()
            try:
                await self._drain(self._spool.end)
                backoff_s = 1.0
            except StorageError as exc:
                logger.warning("%d rollouts wait in the spool: %s", self.pending, exc.message)
                self._drain_wanted.set()
                await self._pause(backoff_s)
                backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            pass

    async def _drain(self, until: SpoolPosition) -> None:
        """Move records to the database until this place is behind. Raises `StorageError`."""
        async with self._drain_lock:
            while self._spool.taken < until:
                num_drained, num_rejected = await self._in_thread(self._move_batch)
                self.drained += num_drained
                self.rejected += num_rejected
                if num_drained + num_rejected == 0:
                    return

    def _move_batch(self) -> tuple[int, int]:
        batch = self._spool.peek(_BATCH_RECORDS)
        if not batch.payloads:
            return 0, 0
        num_rejected = self._insert(batch.payloads)
        self._spool.take(batch.end)
        return len(batch.payloads) - num_rejected, num_rejected

    def _insert(self, payloads: Sequence[bytes]) -> int:
        """Insert records, together if possible; returns how many were rejected for their content."""
        try:
            rollouts = [Rollout.model_validate(json.loads(payload)) for payload in payloads]
            with self._database.writing() as connection:
                insert_rollouts(self._database, connection, rollouts)
        except (RefusedDataError, ValueError, OverflowError) as exc:  # pydantic's errors are ValueErrors
            if len(payloads) == 1:
                self._reject(payloads[0], exc)
                return 1
            middle = len(payloads) // 2
            return self._insert(payloads[:middle]) + self._insert(payloads[middle:])
        return 0

    def _reject(self, payload: bytes, error: Exception) -> None:
        logger.error("a rollout was refused by the database and put into %s: %s", self._rejected_path, error)
        try:
            with self._rejected_path.open("ab") as file:
                file.write(payload + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as exc:
            raise StorageError(f"{self._rejected_path} cannot be written: {exc.strerror}") from exc

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(work, limiter=self._threads)


def _retrieve(task: asyncio.Task[None]) -> None:
    """Look at the error of a task whose caller may have gone."""
    if not task.cancelled():
        task.exception()


def _encode(rollouts: Sequence[Rollout]) -> list[bytes]:
    try:
        # Not by pydantic's own JSON, which turns NaN into null and refuses lone surrogates.
        return [json.dumps(rollout.model_dump(), separators=(",", ":")).encode() for rollout in rollouts]
    except (TypeError, ValueError) as exc:
        raise StorageError(f"a rollout holds a value that JSON cannot carry: {exc}") from exc
