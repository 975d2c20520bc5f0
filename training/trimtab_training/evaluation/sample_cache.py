"""Samples on disk, so that an interrupted evaluation goes on where it stopped."""

import fcntl
import json
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol, Self

from trimtab_adapters.contract.errors import ConflictError, StorageError

SAMPLES_FILE = "samples.jsonl"


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer of a policy.

    Attributes:
        output: Its text.
        num_tokens: Generated tokens of it.
        log_ratio: log steered(output) - log base(output), before temperature and truncation.
        token_kl: Sum over its tokens of KL(steered || base), likewise.
        finish_reason: `stop` or `length`.
    """

    output: str
    num_tokens: int
    log_ratio: float
    token_kl: float
    finish_reason: str


class SampleCache(Protocol):
    """Samples by key. Thread-safe."""

    def get(self, key: str) -> Sample | None:
        """The sample of that key; None when there is none yet."""
        ...

    def put(self, key: str, sample: Sample) -> None:
        """Keep a sample. Raises `StorageError`."""
        ...


class MemorySamples:
    """Samples for the time of one run."""

    def __init__(self) -> None:
        self._samples: dict[str, Sample] = {}

    def get(self, key: str) -> Sample | None:
        """See `SampleCache`."""
        return self._samples.get(key)

    def put(self, key: str, sample: Sample) -> None:
        """See `SampleCache`."""
        self._samples[key] = sample


class SampleFile:
    """`samples.jsonl` in a directory: one line per sample, appended as it comes. Use it as a context manager.

    A last line that a crash cut short is taken off. One process at a time has the file.

    Args:
        directory: Made if need be.

    Raises:
        ConflictError: Another process works in the directory.
        StorageError: The file cannot be opened or is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self._memory = MemorySamples()
        self._lock = threading.Lock()
        path = directory / SAMPLES_FILE
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = path.open("a+b")
        except OSError as exc:
            raise StorageError(f"the samples in {path} cannot be opened: {exc}") from exc
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._load(path)
        except BlockingIOError as exc:
            self._file.close()
            raise ConflictError(f"another evaluation works in {directory}") from exc
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def get(self, key: str) -> Sample | None:
        """See `SampleCache`."""
        return self._memory.get(key)

    def put(self, key: str, sample: Sample) -> None:
        """See `SampleCache`."""
        line = json.dumps({"key": key, **asdict(sample)}).encode() + b"\n"
        with self._lock:
            try:
                self._file.write(line)
                self._file.flush()
            except OSError as exc:
                raise StorageError(f"a sample could not be kept: {exc}") from exc
            self._memory.put(key, sample)

    def _load(self, path: Path) -> None:
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                data = json.loads(line)
                self._memory.put(str(data.pop("key")), Sample(**data))
            except (ValueError, TypeError, KeyError, AttributeError) as exc:
                raise StorageError(f"{path}, line {number} is not a sample: {exc}") from exc
            end += len(line)
        self._file.seek(0, os.SEEK_END)
        if self._file.tell() > end:
            self._file.truncate(end)
