"""Work in a thread beside decoding that gets out of decoding's way.

Python passes its interpreter from one thread to another after `sys.getswitchinterval`, 5 ms by default. Decoding gives
it up at each of the hundreds of operators of a step, so beside a busy thread it would wait 5 ms again and again.
"""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOWEST_PRIORITY = 19
_SWITCH_INTERVAL_S = 0.0005


class _SwitchInterval:
    """The interpreter's switch interval, short while anybody wants it so."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_users = 0
        self._usual_s = 0.0

    def shorten(self) -> None:
        with self._lock:
            if self._num_users == 0:
                self._usual_s = sys.getswitchinterval()
                sys.setswitchinterval(min(self._usual_s, _SWITCH_INTERVAL_S))
            self._num_users += 1

    def restore(self) -> None:
        with self._lock:
            self._num_users -= 1
            if self._num_users == 0:
                sys.setswitchinterval(self._usual_s)


_interval = _SwitchInterval()


@contextmanager
def in_background() -> Iterator[None]:
    """Let the calling thread, and threads that it starts, give way to decoding.

    The thread keeps its low priority to its end: nobody but an administrator may raise it again.
    """
    if sys.platform == "linux":  # elsewhere a priority is the whole process's
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
    _interval.shorten()
    try:
        yield
    finally:
        _interval.restore()
