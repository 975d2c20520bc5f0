"""A durable queue of records on the local disk: appended by requests, emptied into the database.

Records lie in numbered segment files. One process owns the directory, which a lock proves. The newest segment is
appended to until it is full; a segment is deleted when all its records have been taken and it is no longer appended to.
Whatever kills the process, a record whose `append(..., sync=True)` returned is found again by the next `open`.
"""

import fcntl
import logging
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trimtab_adapters.contract.errors import StorageError
from trimtab_server.storage.spool_frames import FrameScan, encode_frames, scan_frames

logger = logging.getLogger(__name__)

_SEGMENT_NAME = re.compile(r"(\d{10})\.seg")
_READ_BYTES = 1 << 20


@dataclass(slots=True)
class _Segment:
    """Attributes: number; path; size_bytes: bytes of complete records; the only part that is ever read."""

    number: int
    path: Path
    size_bytes: int = 0


@dataclass(frozen=True, slots=True, order=True)
class SpoolPosition:
    """A place between two records."""

    segment: int
    offset: int


@dataclass(frozen=True, slots=True)
class SpoolBatch:
    """The oldest records that have not been taken, and the place behind them. Empty when there is none."""

    payloads: tuple[bytes, ...]
    end: SpoolPosition


class Spool:
    """The queue. One thread may append while another takes; calls block on the disk.

    Args:
        directory: Made when missing.
        segment_bytes: A segment that has grown to this is closed.
    """

    def __init__(self, directory: Path, *, segment_bytes: int = 8 << 20) -> None:
        self.directory = directory
        self._segment_bytes = segment_bytes
        self._state = threading.Lock()  # guards the segment list and the sizes in it; held only for moments
        self._segments: list[_Segment] = []
        self._next_number = 1
        self._taken = SpoolPosition(0, 0)
        self._lock_descriptor: int | None = None
        self._active_descriptor: int | None = None

    @property
    def end(self) -> SpoolPosition:
        """The place behind the newest record."""
        with self._state:
            if not self._segments:
                return self._taken
            return SpoolPosition(self._segments[-1].number, self._segments[-1].size_bytes)

    @property
    def taken(self) -> SpoolPosition:
        """The place up to which records have been taken."""
        return self._taken

    def open(self) -> int:
        """Lock the directory, cut torn tails, and return the number of records that wait from before.

        Raises:
            StorageError: Another process uses the directory, or it cannot be used.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock_descriptor = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._lock_descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as exc:
                os.close(self._lock_descriptor)
                self._lock_descriptor = None
                raise StorageError(
                    f"the rollout spool {self.directory} is in use by another gateway; give each its own data directory"
                ) from exc
            return sum(self._recover(path) for path in sorted(self.directory.iterdir()))
        except OSError as exc:
            raise StorageError(f"the rollout spool {self.directory} cannot be opened: {exc.strerror}") from exc

    def append(self, payloads: Sequence[bytes], *, sync: bool) -> None:
        """Write records, with `sync` to the disk itself. All of them or, as far as a caller is told, none.

        Raises:
            StorageError: They could not be written. Nothing of them will be read by this process; after a crash a
                part of them may be found.
        """
        try:
            frames = encode_frames(payloads)
        except ValueError as exc:
            raise StorageError(f"the rollouts cannot be spooled: {exc}") from exc
        try:
            segment, descriptor = self._active_segment()
            _write_all(descriptor, frames)
            if sync:
                os.fsync(descriptor)
        except OSError as exc:
            self._abandon_active()
            raise StorageError(f"the rollout spool {self.directory} cannot be written: {exc.strerror}") from exc
        with self._state:
            segment.size_bytes += len(frames)
            is_full = segment.size_bytes >= self._segment_bytes
        if is_full:
            self._close_active()

    def peek(self, max_records: int) -> SpoolBatch:
        """Read the oldest records that have not been taken; they stay until `take`.

        Raises:
            StorageError: They cannot be read.
        """
        while True:
            found = self._segment_to_read()
            if found is None:
                return SpoolBatch((), self._taken)
            segment, size_bytes = found
            try:
                scan = _read_frames(segment.path, self._taken.offset, size_bytes, max_records)
            except OSError as exc:
                raise StorageError(f"the rollout spool's {segment.path.name} cannot be read: {exc.strerror}") from exc
            if scan.damaged_bytes:
                logger.error("%s: %d damaged bytes were passed over", segment.path, scan.damaged_bytes)
            if scan.payloads:
                return SpoolBatch(tuple(scan.payloads), SpoolPosition(segment.number, self._taken.offset + scan.end))
            logger.error("%s: %d damaged bytes at its end", segment.path, size_bytes - self._taken.offset)
            self.take(SpoolPosition(segment.number, size_bytes))

    def take(self, end: SpoolPosition) -> None:
        """Forget the records before this place; they are safe elsewhere. Deletes segments that are done."""
        self._taken = end = max(end, self._taken)
        with self._state:
            active = self._segments[-1] if self._active_descriptor is not None else None
            done = [
                s
                for s in self._segments
                if s is not active
                and (s.number < end.segment or (s.number == end.segment and s.size_bytes <= end.offset))
            ]
            self._segments = [s for s in self._segments if s not in done]
        for segment in done:
            try:
                segment.path.unlink(missing_ok=True)
            except OSError as exc:  # harmless: its records are taken again, to no effect, after the next start
                logger.warning("%s cannot be deleted: %s", segment.path, exc.strerror)

    def close(self) -> None:
        """Flush, delete what has been taken, and unlock. Records that wait stay for the next `open`."""
        self._close_active()
        self.take(self._taken)
        if self._lock_descriptor is not None:
            os.close(self._lock_descriptor)
            self._lock_descriptor = None

    def _recover(self, path: Path) -> int:
        """Take up a segment of an earlier process; returns its number of records."""
        name = _SEGMENT_NAME.fullmatch(path.name)
        if name is None:
            return 0
        number = int(name[1])
        self._next_number = max(self._next_number, number + 1)
        data = path.read_bytes()
        scan = scan_frames(data)
        if not scan.payloads:
            if b"\n" in data:  # whole records, none of them valid: no crash does that
                logger.error("%s is damaged and was put aside", path)
                path.rename(path.with_suffix(".damaged"))
            else:
                path.unlink()
            return 0
        if scan.end < len(data):
            logger.warning("%s: a torn tail of %d bytes was cut off", path, len(data) - scan.end)
            with path.open("r+b") as file:
                file.truncate(scan.end)
                os.fsync(file.fileno())
        self._segments.append(_Segment(number, path, scan.end))
        return len(scan.payloads)

    def _active_segment(self) -> tuple[_Segment, int]:
        if self._active_descriptor is not None:
            return self._segments[-1], self._active_descriptor
        number = self._next_number
        path = self.directory / f"{number:010d}.seg"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._next_number += 1
        try:
            _sync_directory(self.directory)
        except OSError:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise
        segment = _Segment(number, path)
        with self._state:
            self._segments.append(segment)
            self._active_descriptor = descriptor
        return segment, descriptor

    def _abandon_active(self) -> None:
        """After a failed write: whatever the file holds behind the good records is never followed by more.

        A failed flush is not tried again, because the kernel may have dropped the pages and report success.
        """
        if self._active_descriptor is None:
            return
        with self._state:
            segment, descriptor = self._segments[-1], self._active_descriptor
            self._active_descriptor = None
            if segment.size_bytes == 0:  # or a full disk would leave one empty file per attempt
                self._segments.pop()
        try:
            os.ftruncate(descriptor, segment.size_bytes)
            if segment.size_bytes == 0:
                segment.path.unlink(missing_ok=True)
        except OSError as exc:
            logger.warning("%s cannot be cut back: %s", segment.path, exc.strerror)
        finally:
            os.close(descriptor)

    def _close_active(self) -> None:
        with self._state:
            descriptor, self._active_descriptor = self._active_descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _segment_to_read(self) -> tuple[_Segment, int] | None:
        """The oldest segment with records that have not been taken, and how far it may be read."""
        with self._state:
            for segment in self._segments:
                if segment.number > self._taken.segment:
                    self._taken = SpoolPosition(segment.number, 0)
                if segment.number == self._taken.segment and self._taken.offset < segment.size_bytes:
                    return segment, segment.size_bytes
        return None


def _read_frames(path: Path, start: int, end: int, max_records: int) -> FrameScan:
    """Scan `[start, end)` in growing stretches until records are found."""
    length = _READ_BYTES
    with path.open("rb") as file:
        while True:
            file.seek(start)
            scan = scan_frames(file.read(min(length, end - start)), max_records=max_records)
            if scan.payloads or length >= end - start:
                return scan
            length *= 4


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
