"""How a run is asked to stop before its end, from a signal handler or another thread."""

import threading
import time
from typing import Literal

StopReason = Literal["cancelled", "released", "lost", "limit"]
"""Cancelled by its owner; released so that another worker can go on with it; lost to another worker; beyond a limit of
its configuration."""


class TrainingInterrupted(Exception):  # noqa: N818 - not an error: the run obeyed
    """The run stopped because it was asked to. Its checkpoint was written if it had begun to train."""

    def __init__(self, reason: StopReason) -> None:
        super().__init__(f"training stopped: {reason}")
        self.reason: StopReason = reason


class Interruption:
    """A request to stop, checked by the run between steps, requests and generated tokens. Thread-safe."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._is_requested = threading.Lock()
        self._reason: StopReason = "released"
        self._deadline: float | None = None

    def request(self, reason: StopReason) -> None:
        """Ask the run to stop; the first reason counts."""
        if self._is_requested.acquire(blocking=False):  # never waits, so a signal handler may call it at any point
            self._reason = reason
            self._event.set()

    def expire_at(self, deadline: float) -> None:
        """Count the run as lost from a time of `time.monotonic` on; a later call moves it.

        A lease that nobody extended must end the run even when no thread is left to say so, or when all of them slept.
        """
        self._deadline = deadline

    def check(self) -> None:
        """Raise `TrainingInterrupted` when a stop was asked for."""
        if self._deadline is not None and time.monotonic() > self._deadline:
            self.request("lost")
        if self._event.is_set():
            raise TrainingInterrupted(self._reason)

    def wait(self, timeout_s: float) -> None:
        """Sleep for at most `timeout_s`; raise `TrainingInterrupted` as soon as a stop is asked for."""
        self._event.wait(timeout_s)
        self.check()
