"""A run's directory, which one process at a time may write to."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trimtab_adapters.contract.errors import ConflictError, StorageError
from trimtab_training.interruption import Interruption

LOCK_FILE = "lock"
_POLL_S = 0.5


@contextmanager
def held(directory: Path, interruption: Interruption, *, wait: bool) -> Iterator[None]:
    """Hold a run's directory alone; made if need be. The system lets go of it when this process dies, however it does.

    Args:
        directory: The run's `output_dir`.
        interruption: Ends the waiting.
        wait: Whether to wait for another process that holds it, such as a worker that has just lost this job.

    Raises:
        ConflictError: Another process holds it, and `wait` is False.
        StorageError: The directory or the lock cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / LOCK_FILE).open("a+", encoding="utf-8")
    except OSError as exc:
        raise StorageError(f"{directory} cannot be used as output_dir: {exc}") from exc
    with file:
        while not _locked(file.fileno()):
            if not wait:
                file.seek(0)
                raise ConflictError(f"another process is at work in {directory}: {file.read().strip() or 'unknown'}")
            interruption.wait(_POLL_S)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
