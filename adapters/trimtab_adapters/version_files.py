"""Files of a version on their way into the store: copied or linked, flushed, and hashed as they are read."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from trimtab_adapters.contract.errors import IntegrityError, ManifestError
from trimtab_adapters.contract.manifest import FileEntry, read_manifest

_CHUNK_BYTES = 1 << 20


def copy_file(source: Path, target: Path) -> FileEntry:
    """Copy a file, flushed and read-only; returns the hash of what was written. Raises `IntegrityError`."""
    digest, size_bytes = hashlib.sha256(), 0
    try:
        reader = source.open("rb")
    except OSError as exc:
        raise IntegrityError(f"{source.name} cannot be read: {exc.strerror}") from exc
    with reader, target.open("xb") as writer:
        while chunk := reader.read(_CHUNK_BYTES):
            digest.update(chunk)
            size_bytes += len(chunk)
            writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())
    target.chmod(0o444)
    return FileEntry(sha256=digest.hexdigest(), size_bytes=size_bytes)


def link_file(source: Path, target: Path, versions: Iterable[Path]) -> FileEntry:
    """Like `copy_file`, but a hard link where one of these versions has the same file under the same name.

    The linked file is read again before it counts, so that a damaged one does not spread.
    """
    wanted = hash_file(source)
    for version in versions:
        try:
            if read_manifest(version).files.get(target.name) != wanted:
                continue
            target.hardlink_to(version / target.name)
        except (ManifestError, OSError):  # damaged, just removed, or a file system without links
            continue
        if hash_file(target) == wanted:
            return wanted
        target.unlink()
    return copy_file(source, target)


def hash_file(path: Path) -> FileEntry:
    """Hash and size of a file. Raises `IntegrityError`."""
    try:
        with path.open("rb") as file:
            return FileEntry(sha256=hashlib.file_digest(file, "sha256").hexdigest(), size_bytes=path.stat().st_size)
    except OSError as exc:
        raise IntegrityError(f"{path.name} cannot be read: {exc.strerror}; register the version again") from exc


def check_entry(name: str, stated: FileEntry, found: FileEntry) -> None:
    """Raises `IntegrityError` when a file is not what a manifest states."""
    if stated.size_bytes != found.size_bytes:
        raise IntegrityError(
            f"{name} has {found.size_bytes} bytes, the manifest says {stated.size_bytes}; copy the version again"
        )
    if stated.sha256 != found.sha256:
        raise IntegrityError(
            f"{name} has the SHA-256 {found.sha256[:12]}..., the manifest says {stated.sha256[:12]}...; it was changed "
            "or damaged after it was published"
        )
