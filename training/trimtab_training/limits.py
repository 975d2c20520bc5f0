"""A run's limits on time and memory, watched from a thread of their own."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import torch

from trimtab_adapters.contract.errors import TrainingLimitError
from trimtab_training.config import LimitsConfig
from trimtab_training.interruption import Interruption, TrainingInterrupted

GIB = 1 << 30


class LimitWatch:
    """Asks a run to stop when it is beyond a limit.

    Args:
        limits: The limits.
        interruption: Of the run.
        resident_bytes: Measures the memory.
        clock: Seconds from any point.
    """

    def __init__(
        self,
        limits: LimitsConfig,
        interruption: Interruption,
        *,
        resident_bytes: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._interruption = interruption
        self._resident_bytes = resident_bytes
        self._clock = clock
        self._began_at = clock()
        self._stopped = threading.Event()
        self.finding: str | None = None

    @property
    def spent_s(self) -> float:
        """Seconds since the beginning, earlier attempts included."""
        return self._clock() - self._began_at

    def go_on_from(self, spent_s: float) -> None:
        """Count what earlier attempts took; the run is asked to stop at once when that was enough."""
        self._began_at -= spent_s
        self.look()

    def look(self) -> None:
        """Compare with the limits once."""
        if self.finding is None and (finding := self._find()) is not None:
            self.finding = finding
            self._interruption.request("limit")

    def keep_looking(self) -> None:
        """Look again and again until `stop`."""
        while not self._stopped.wait(self._limits.interval_s):
            self.look()

    def stop(self) -> None:
        """Let `keep_looking` return."""
        self._stopped.set()

    def _find(self) -> str | None:
        limits = self._limits
        if limits.time_s is not None and (spent_s := self.spent_s) > limits.time_s:
            return f"the run has taken {spent_s:.1f} s, limits.time_s allows {limits.time_s:g}"
        if limits.memory_gib is not None and (used := self._resident_bytes() / GIB) > limits.memory_gib:
            return f"the run holds {used:.2f} GiB of memory, limits.memory_gib allows {limits.memory_gib:g}"
        if limits.gpu_memory_gib is not None and (used := _gpu_bytes() / GIB) > limits.gpu_memory_gib:
            return f"the run holds {used:.2f} GiB of GPU memory, limits.gpu_memory_gib allows {limits.gpu_memory_gib:g}"
        return None


def resident_bytes() -> int:
    """Resident memory of this process and all its descendants; shared pages count in each."""
    process = psutil.Process()
    total: int = process.memory_info().rss
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            total += child.memory_info().rss
    return total


@contextmanager
def limited(limits: LimitsConfig, interruption: Interruption) -> Iterator[LimitWatch]:
    """Watch the limits for as long as the context lasts.

    Raises:
        TrainingLimitError: In the place of the `TrainingInterrupted` by which the run obeyed.
    """
    watch = LimitWatch(limits, interruption, resident_bytes=resident_bytes)
    thread = threading.Thread(target=watch.keep_looking, name="limits", daemon=True)
    thread.start()
    try:
        yield watch
    except TrainingInterrupted as exc:
        if exc.reason == "limit":
            raise TrainingLimitError(
                f"{watch.finding}; a checkpoint has what it had learned, and with a higher limit it goes on from there"
            ) from exc
        raise
    finally:
        watch.stop()
        thread.join()


def _gpu_bytes() -> int:
    """What torch holds on the current GPU; 0 where none is in use."""
    return torch.cuda.memory_reserved() if torch.cuda.is_available() else 0
