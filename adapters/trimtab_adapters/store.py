"""The store of adapter versions: one immutable, content-addressed directory per version."""

import fcntl
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trimtab_adapters.contract.errors import IntegrityError, ManifestError, NotFoundError, StorageError, VocabularyError
from trimtab_adapters.contract.lora import read_lora_config
from trimtab_adapters.contract.manifest import (
    LORA_CONFIG_FILE,
    LORA_FILES,
    MANIFEST_FILE,
    FileEntry,
    LoraEntry,
    Manifest,
    read_manifest,
    read_vocabulary,
    trunk_fingerprint,
    vocabulary_fingerprint,
)
from trimtab_adapters.contract.params import VersionId
from trimtab_adapters.version_directory import (
    check_configuration,
    check_listed_names,
    check_vocabulary,
    check_weights,
    list_files,
    select_files,
    select_lora_files,
)
from trimtab_adapters.version_files import check_entry, copy_file, hash_file, link_file

_INCOMING = ".incoming-"
_REMOVED = ".removed-"
_ABANDONED_S = 3600.0
_VERSION_ID = re.compile(r"[0-9a-f]{16}")


class VersionStore:
    """Version directories under one root, each named by its version id.

    A version appears under its name complete, flushed and checked, or not at all. Several processes may use one root.

    Args:
        root: Made when missing.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(
        self,
        source: Path,
        *,
        name: str,
        trunk: Path | None = None,
        prefix_token_ids: Sequence[int] | None = None,
        default_alpha: float | None = None,
        training: Mapping[str, Any] | None = None,
        described: Mapping[str, Any] | None = None,
        expected_vocabulary: tuple[str, int] | None = None,
    ) -> tuple[Manifest, Path]:
        """Copy a directory into the store and check the copy. The same content gives the same version again.

        Args:
            source: A version directory with `manifest.json`, or any causal-LM directory with safetensors weights, for
                which a manifest is made (with an empty `created_at`, so that the id depends on the content alone). With
                a trunk, a LoRA as PEFT saves it.
            name: Name of the adapter. Where it, or any argument below, differs from what the directory's manifest
                says, the stored version says what was asked, and so has another id.
            trunk: The LM that the LoRA was trained on: a version directory or any causal-LM directory. Its files
                become part of the version, as links to those of another version where the store has them already.
            prefix_token_ids: What the adapter sees before prompt and output.
            default_alpha: Weight where a request names none.
            training: How it was trained.
            described: Further fields of the manifest that tell where the version comes from: `reward`, `evaluation`,
                `created_at`, `calibrator`.
            expected_vocabulary: Fingerprint and number of tokens of the base model's tokenizer; None leaves this
                check to the engine.

        Returns:
            The manifest and the directory in the store.

        Raises:
            AdapterError: The directory is refused; nothing is stored.
            StorageError: It could not be written.
        """
        files, stated = _described(source)
        model_stated = stated
        if trunk is not None:
            trunk_files, model_stated = _described(trunk)
            sources = select_lora_files(files, trunk_files, model_stated)
        else:
            names = _listed(stated, files) if stated is not None else select_files(files)
            sources = {name: files[name] for name in names}
        changes: dict[str, Any] = {
            "name": name,
            **({} if prefix_token_ids is None else {"prefix_token_ids": list(prefix_token_ids)}),
            **({} if default_alpha is None else {"default_alpha": default_alpha}),
            **({} if training is None else {"training": dict(training)}),
            **(described or {}),
        }
        try:
            with self._incoming() as directory:
                # Small files first: most refusals come before gigabytes are copied.
                small = [n for n in sources if not n.endswith(".safetensors")]
                entries = self._copy(sources, small, directory, model_stated)
                check_configuration(directory, small)
                vocabulary = check_vocabulary(directory, small, model_stated, expected_vocabulary)
                if trunk is not None:
                    _check_lora_vocabulary(source, files, vocabulary)
                large = [n for n in sources if n not in small]
                entries |= self._copy(sources, large, directory, model_stated, is_shared=sources.keys() >= LORA_FILES)
                check_weights(directory, sources)
                if trunk is not None:
                    changes["lora"] = _lora_entry(directory, entries)
                manifest = _manifest(stated, entries, vocabulary, changes)
                _write_manifest(directory, manifest)
                return manifest, self._publish(directory, manifest)
        except OSError as exc:
            raise StorageError(f"the version store {self.root} cannot be written: {exc.strerror}") from exc

    def open(self, version_id: VersionId) -> tuple[Manifest, Path]:
        """Read a version and verify every file against its hash.

        Raises:
            NotFoundError: There is no such version.
            ManifestError: Its manifest is not readable or belongs to another version.
            IntegrityError: A file is missing or has changed.
        """
        path = self._path(version_id)
        manifest = read_manifest(path)
        if manifest.version_id != version_id:
            raise ManifestError(f"{path} holds the version {manifest.version_id}; restore it from a copy")
        for name, entry in manifest.files.items():
            check_entry(name, entry, hash_file(path / name))
        return manifest, path

    def remove(self, version_id: VersionId) -> None:
        """Delete a version. An engine that holds it in memory is not affected.

        Raises:
            NotFoundError: There is no such version.
            StorageError: It could not be deleted.
        """
        try:
            self._discard(self._path(version_id))
        except OSError as exc:
            raise StorageError(f"the version {version_id} cannot be deleted: {exc.strerror}") from exc

    def _path(self, version_id: str) -> Path:
        path = self.root / version_id
        if not _VERSION_ID.fullmatch(version_id) or not path.is_dir():
            raise NotFoundError(f"the version store holds no version `{version_id}`", code="version_not_found")
        return path

    def _copy(
        self,
        sources: Mapping[str, Path],
        names: Sequence[str],
        directory: Path,
        stated: Manifest | None,
        *,
        is_shared: bool = False,
    ) -> dict[str, FileEntry]:
        """Copy files, flushed; returns their hashes, which must be those that the manifest states.

        Shared files are linked where a version in the store has them; what belongs to a LoRA alone is always copied.
        """
        entries = {}
        for name in names:
            target = directory / name
            if is_shared and name not in LORA_FILES:
                versions = (path for path in self.root.iterdir() if _VERSION_ID.fullmatch(path.name))
                entries[name] = link_file(sources[name], target, versions)
            else:
                entries[name] = copy_file(sources[name], target)
            if stated is not None and name in stated.files:
                check_entry(name, stated.files[name], entries[name])
        return entries

    @contextmanager
    def _incoming(self) -> Iterator[Path]:
        """A directory to build a version in, removed unless it was renamed. Its lock says that its maker is alive."""
        self.root.mkdir(parents=True, exist_ok=True)
        self._sweep()
        path = self.root / f"{_INCOMING}{secrets.token_hex(8)}"
        path.mkdir(mode=0o755)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield path
        finally:
            os.close(descriptor)
            shutil.rmtree(path, ignore_errors=True)

    def _sweep(self) -> None:
        """Delete what processes that were killed left behind."""
        for path in self.root.iterdir():
            if path.name.startswith(_REMOVED) or (path.name.startswith(_INCOMING) and _is_abandoned(path)):
                shutil.rmtree(path, ignore_errors=True)

    def _publish(self, directory: Path, manifest: Manifest) -> Path:
        target = self.root / manifest.version_id
        if target.exists():
            try:
                return self.open(manifest.version_id)[1]
            except (ManifestError, IntegrityError):
                self._discard(target)  # damaged: what was just checked takes its place
        _sync_directory(directory)
        try:
            directory.rename(target)
        except OSError:
            if not target.exists():
                raise
            return self.open(manifest.version_id)[1]  # another process was faster
        _sync_directory(self.root)
        return target

    def _discard(self, path: Path) -> None:
        aside = self.root / f"{_REMOVED}{secrets.token_hex(8)}"
        path.rename(aside)
        _sync_directory(self.root)
        shutil.rmtree(aside, ignore_errors=True)  # what stays is swept by the next `add`


def _listed(manifest: Manifest, files: Mapping[str, Path]) -> list[str]:
    check_listed_names(manifest)
    if missing := sorted(set(manifest.files) - set(files)):
        raise IntegrityError(f"{', '.join(missing)}: listed in {MANIFEST_FILE} but missing; publish the version again")
    return sorted(manifest.files)


def _described(directory: Path) -> tuple[dict[str, Path], Manifest | None]:
    """The files of a directory, and its manifest if it has one."""
    files = list_files(directory)
    return files, read_manifest(directory) if MANIFEST_FILE in files else None


def _check_lora_vocabulary(source: Path, files: Mapping[str, Path], vocabulary: tuple[str, int]) -> None:
    """Raises `VocabularyError` when the tokenizer that was saved with a LoRA is not its trunk's."""
    if "tokenizer.json" in files and vocabulary_fingerprint(found := read_vocabulary(source)) != vocabulary[0]:
        raise VocabularyError(
            f"the tokenizer saved with the LoRA ({len(found)} tokens) is not the trunk's ({vocabulary[1]} tokens); "
            "tokens that were added in training have embeddings that a LoRA does not hold"
        )


def _lora_entry(directory: Path, entries: Mapping[str, FileEntry]) -> LoraEntry:
    config = read_lora_config(directory / LORA_CONFIG_FILE)
    return LoraEntry(trunk_sha256=trunk_fingerprint(entries), r=config.r, lora_alpha=config.lora_alpha)


def _manifest(
    stated: Manifest | None, entries: dict[str, FileEntry], vocabulary: tuple[str, int], changes: Mapping[str, Any]
) -> Manifest:
    if stated is not None:
        fields = stated.model_dump()
    else:
        fields = {"vocabulary_sha256": vocabulary[0], "vocab_size": vocabulary[1], "files": entries}
    try:
        manifest = Manifest.model_validate({**fields, **changes})
        manifest.canonical_json()
    except (ValidationError, ValueError, TypeError) as exc:
        raise ManifestError(f"no manifest can be made for this version: {exc}") from exc
    return manifest


def _write_manifest(directory: Path, manifest: Manifest) -> None:
    path = directory / MANIFEST_FILE
    with path.open("x", encoding="utf-8") as file:
        json.dump(manifest.model_dump(mode="json"), file, indent=2, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    path.chmod(0o444)
    if read_manifest(directory).version_id != manifest.version_id:
        raise ManifestError("the manifest does not survive being written as JSON; keep to plain JSON values in it")


def _is_abandoned(path: Path) -> bool:
    try:
        if time.time() - path.stat().st_mtime < _ABANDONED_S:
            return False
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
