"""How a run is asked to stop before its end, from a signal handler or another thread."""

import threading
from typing import Literal

StopReason = Literal["cancelled", "released", "lost"]
"""Cancelled by its owner; released so that another worker can go on with it; lost to another worker."""


class TrainingInterrupted(Exception):  # noqa: N818 - not an error: the run obeyed
    """The run stopped because it was asked to. Its checkpoint was written if it had begun to train."""

    def __init__(self, reason: StopReason) -> None:
        super().__init__(f"training stopped: {reason}")
        self.reason: StopReason = reason


class Interruption:
    """A request to stop, checked by the run between steps, requests and generated tokens. Thread-safe."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._reason: StopReason = "released"

    def request(self, reason: StopReason) -> None:
        """Ask the run to stop; the first reason counts."""
        if not self._event.is_set():
            self._reason = reason
            self._event.set()

    def check(self) -> None:
        """Raise `TrainingInterrupted` when a stop was asked for."""
        if self._event.is_set():
            raise TrainingInterrupted(self._reason)

    def wait(self, timeout_s: float) -> None:
        """Sleep for at most `timeout_s`; raise `TrainingInterrupted` as soon as a stop is asked for."""
        self._event.wait(timeout_s)
        self.check()
