"""Switching a route to another adapter version while streams are under way on it."""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from trimtab_adapters.contract.errors import TrimtabError
from trimtab_training.demo.gateway import Gateway

_NUM_STREAMS: Final = 3
_FIRST_CHUNKS_TIMEOUT_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class StreamTrace:
    """One finished stream: when it ran, the versions that its first and last chunk named, and its error if it broke."""

    started_s: float
    ended_s: float
    first_version: str | None
    last_version: str | None
    num_chunks: int
    error: str | None = None


@dataclass(frozen=True, slots=True)
class SwapReport:
    """What happened to the streams around a switch.

    Attributes:
        switch_s: How long the switch took.
        num_spanning: Streams that ended after the switch and had begun before it, or while it was being prepared: a
            switch loads weights, and a short stream may begin and end meanwhile.
        num_kept: Of these, how many ended normally on the old version.
        num_failed: Streams of any time that broke off.
        num_on_new: Streams that began after the switch and ran on the new version.
    """

    switch_s: float
    num_spanning: int
    num_kept: int
    num_failed: int
    num_on_new: int

    @property
    def is_seamless(self) -> bool:
        """Whether some stream lived through the switch, and none was disturbed."""
        return 0 < self.num_spanning == self.num_kept and self.num_failed == 0 < self.num_on_new


class _Streams:
    """Threads that stream one completion after the other until told to stop, each at least one more after that."""

    def __init__(self, gateway: Gateway, body: Mapping[str, Any]) -> None:
        self._gateway = gateway
        self._body = body
        self._stopping = threading.Event()
        self._running = threading.Barrier(_NUM_STREAMS + 1)
        self._lock = threading.Lock()
        self._traces: list[StreamTrace] = []
        self._threads = [threading.Thread(target=self._loop, daemon=True) for _ in range(_NUM_STREAMS)]

    def start(self) -> None:
        """Start all of them and wait until each has shown its first chunk."""
        for thread in self._threads:
            thread.start()
        self._running.wait(_FIRST_CHUNKS_TIMEOUT_S)

    def finish(self) -> list[StreamTrace]:
        """Let what runs end, run one more stream each, and return all traces."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        return self._traces

    def abandon(self) -> None:
        """Stop without waiting."""
        self._stopping.set()
        self._running.abort()

    def _loop(self) -> None:
        is_first = True
        while True:
            is_last = self._stopping.is_set()
            trace = self._stream(is_first)
            is_first = False
            with self._lock:
                self._traces.append(trace)
            if is_last or trace.error is not None:
                return

    def _stream(self, is_first: bool) -> StreamTrace:
        started, versions, num_chunks, error = time.monotonic(), [], 0, None
        try:
            for chunk in self._gateway.stream(self._body):
                num_chunks += 1
                if is_first and num_chunks == 1:
                    self._running.wait(_FIRST_CHUNKS_TIMEOUT_S)
                if "steering" in chunk:
                    versions.append(str(chunk["steering"]["adapters"][0]["version"]))
        except TrimtabError as exc:
            error = exc.message
            if is_first:
                self._running.abort()
        except threading.BrokenBarrierError:
            error = "another stream did not start"
        first, last = (versions[0], versions[-1]) if versions else (None, None)
        return StreamTrace(started, time.monotonic(), first, last, num_chunks, error)


def switch_under_streams(
    gateway: Gateway, *, route: str, adapter: str, version: str, body: Mapping[str, Any]
) -> SwapReport:
    """Switch a route while streams run on it.

    Args:
        gateway: The connection.
        route: The route.
        adapter: The adapter whose version shall be active.
        version: That version.
        body: What the streams ask for; should take longer than the switch.

    Raises:
        TrimtabError: The route could not be switched, or a stream did not start.
    """
    old = gateway.route_version(route)
    streams = _Streams(gateway, body)
    try:
        try:
            streams.start()
        except threading.BrokenBarrierError as exc:
            traces = streams.finish()
            reason = next((trace.error for trace in traces if trace.error), "no chunk came in time")
            raise TrimtabError(f"a stream on {route} did not start: {reason}") from exc
        before = time.monotonic()
        gateway.activate(route, adapter, version)
        after = time.monotonic()
        if (now := gateway.route_version(route)) != version:
            raise TrimtabError(f"the route {route} should use version {version} but uses {now}")
        traces = streams.finish()
    finally:
        streams.abandon()
    return report_of(traces, before=before, after=after, old=old, new=version)


def report_of(traces: list[StreamTrace], *, before: float, after: float, old: str, new: str) -> SwapReport:
    """Sort traces around a switch that took place between the times `before` and `after`."""
    lasting = [t for t in traces if t.started_s < after < t.ended_s]
    spanning = [t for t in lasting if t.started_s < before or t.first_version == old]
    kept = [t for t in spanning if t.error is None and t.first_version == t.last_version == old]
    on_new = [t for t in traces if t.started_s > after and t.error is None and t.first_version == t.last_version == new]
    return SwapReport(
        switch_s=after - before,
        num_spanning=len(spanning),
        num_kept=len(kept),
        num_failed=sum(trace.error is not None for trace in traces),
        num_on_new=len(on_new),
    )
