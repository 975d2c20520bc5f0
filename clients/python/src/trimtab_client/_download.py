"""A file that is being downloaded: under a temporary name beside its own until it is complete."""

import os
import tempfile
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Self


class Download:
    """Renamed to its destination when the `with` block ends well, removed when it does not."""

    def __init__(self, destination: str | PathLike[str]) -> None:
        self._destination = Path(destination)
        self.size_bytes = 0

    def __enter__(self) -> Self:
        directory = self._destination.parent
        handle, name = tempfile.mkstemp(dir=directory, prefix=f".{self._destination.name}.", suffix=".part")
        self._file = os.fdopen(handle, "wb")
        self._partial = Path(name)
        return self

    def write(self, chunk: bytes) -> None:
        """Append."""
        self.size_bytes += self._file.write(chunk)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None:
            self._partial.replace(self._destination)
        else:
            self._partial.unlink(missing_ok=True)
