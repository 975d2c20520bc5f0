"""Flushing files and directories to disk before a rename makes them visible."""

import os
from pathlib import Path


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries: new names and renames in it."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Flush all files below a directory and the directories themselves."""
    for parent, _, names in os.walk(directory):
        for name in names:
            with (Path(parent) / name).open("rb") as file:
                os.fsync(file.fileno())
        sync_directory(Path(parent))
