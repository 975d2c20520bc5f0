"""What a job tells about itself with its heartbeats: its progress, and the new lines of its log and metrics."""

import logging
import math
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

from typing_extensions import override

from trimtab_adapters.contract.errors import StorageError

_MOST_WAITING = 2000
_MOST_AT_ONCE = 500
_LONGEST_LINE = 4000
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

_Content = TypeVar("_Content")


class LineQueue(Generic[_Content]):
    """Numbered lines that wait to be sent, from 1; when too many wait, the oldest are left out. Thread-safe."""

    def __init__(self, most_waiting: int = _MOST_WAITING) -> None:
        self._lines: deque[tuple[int, _Content]] = deque(maxlen=most_waiting)
        self._num_added = 0
        self._lock = threading.Lock()

    def add(self, content: _Content) -> None:
        """Give a line its number and keep it until it was sent."""
        with self._lock:
            self._num_added += 1
            self._lines.append((self._num_added, content))

    def waiting(self, most: int = _MOST_AT_ONCE) -> list[tuple[int, _Content]]:
        """The oldest lines that wait, with their numbers."""
        with self._lock:
            return list(self._lines)[:most]

    def sent(self, number: int) -> None:
        """Forget the lines up to a number."""
        with self._lock:
            while self._lines and self._lines[0][0] <= number:
                self._lines.popleft()


class JobFeed:
    """What the next heartbeat of a job tells. Call it with progress, as a recipe does. Thread-safe."""

    def __init__(self) -> None:
        self.progress: Mapping[str, Any] = {}
        self.log: LineQueue[str] = LineQueue()
        self.metrics: LineQueue[Mapping[str, float]] = LineQueue()

    def __call__(self, progress: Mapping[str, Any]) -> None:
        """Replace the progress."""
        self.progress = progress

    def body(self) -> dict[str, Any]:
        """`progress`, `log` and `metrics` of a heartbeat; the latter two only when there are new lines."""
        log = [{"number": number, "text": text} for number, text in self.log.waiting()]
        metrics = [_metrics_line(number, line) for number, line in self.metrics.waiting()]
        body: dict[str, Any] = {"progress": _finite(self.progress)}
        return body | ({"log": log} if log else {}) | ({"metrics": metrics} if metrics else {})

    def sent(self, body: Mapping[str, Any]) -> None:
        """Do not send again what the gateway has taken."""
        for queue, name in ((self.log, "log"), (self.metrics, "metrics")):
            if lines := body.get(name):
                queue.sent(lines[-1]["number"])


@contextmanager
def job_log(path: Path, feed: JobFeed) -> Iterator[None]:
    """Write everything that this process logs to a job's file, and its lines to the feed, while the context lasts.

    Raises:
        StorageError: The file cannot be opened.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(path, encoding="utf-8")
    except OSError as exc:
        raise StorageError(f"the log {path} cannot be written: {exc}") from exc
    handlers = (file, _FeedHandler(feed.log))
    root = logging.getLogger()
    for handler in handlers:
        handler.setFormatter(logging.Formatter(_FORMAT))
        root.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()


class _FeedHandler(logging.Handler):
    def __init__(self, queue: LineQueue[str]) -> None:
        super().__init__()
        self._queue = queue

    @override
    def emit(self, record: logging.LogRecord) -> None:
        for line in self.format(record).splitlines():
            self._queue.add(line[:_LONGEST_LINE])


def _metrics_line(number: int, line: Mapping[str, float]) -> dict[str, Any]:
    figures = _finite(line)
    return {"number": number, "step": figures.pop("step"), "time": figures.pop("time"), "figures": figures}


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN or infinity: they become null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
