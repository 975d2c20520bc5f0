"""Write an adapter version directory, and register it with the gateway."""

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trimtab_adapters.contract.errors import (
    ConflictError,
    IntegrityError,
    ManifestError,
    NotFoundError,
    StorageError,
    TrimtabError,
)
from trimtab_adapters.contract.manifest import MANIFEST_FILE, FileEntry, Manifest, read_manifest
from trimtab_adapters.contract.params import VersionId
from trimtab_adapters.store import VersionStore
from trimtab_training.durable_files import sync_directory, sync_tree, write_whole
from trimtab_training.gateway import GatewayClient
from trimtab_training.lora_training import save_lora
from trimtab_training.models import Vocabulary, save_causal_lm
from trimtab_training.rollouts import NamedVersion

logger = logging.getLogger(__name__)

VERSIONS = "versions"
"""Directory of a run's results."""
INTERMEDIATE = "intermediate"
"""Directory of the versions that a run draws with; each is deleted after its round."""
_TEMPORARY = ".tmp-"


@dataclass(frozen=True, slots=True)
class VersionInfo:
    """What the manifest says besides the files.

    Attributes:
        name: Name of the adapter.
        alpha: Default weight.
        prefix_token_ids: What the adapter sees first: the best control token and the fixed prefix.
        training: How it was trained, for people.
        reward: `name@version` of the reward.
        evaluation: Figures from the end of training.
        trunk: Directory of the LM that the model is a LoRA on; None for a whole model.
        created_at: ISO 8601, UTC; part of the content that the version's id is the hash of. Now when left out.
    """

    name: str
    alpha: float
    prefix_token_ids: tuple[int, ...]
    training: dict[str, Any]
    reward: str | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)
    trunk: Path | None = None
    created_at: str | None = None


@dataclass(frozen=True, slots=True)
class VersionDirectory:
    """A finished version directory."""

    path: Path
    manifest: Manifest

    @property
    def version(self) -> VersionId:
        """Its identity."""
        return self.manifest.version_id


def write_version(store: Path, model: Any, vocabulary: Vocabulary, info: VersionInfo) -> VersionDirectory:
    """Write a model as the version directory `store/<version id>`.

    It is written under a temporary name, flushed to disk and renamed, so no reader ever sees part of it.

    Raises:
        WeightsError: A weight is NaN or infinite.
        StorageError: The disk refused.
    """
    if info.trunk is not None:
        return _write_lora(store, model, info, info.trunk)
    try:
        store.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=store))
        try:
            save_causal_lm(model, temporary, vocabulary.path)
            manifest = _manifest(temporary, vocabulary, info)
            (temporary / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
            temporary.chmod(0o755)
            sync_tree(temporary)
            target = store / manifest.version_id
            if target.exists():  # a run that was killed after this wrote the same
                shutil.rmtree(temporary)
            else:
                temporary.rename(target)
                sync_directory(store)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as exc:
        raise StorageError(f"the version cannot be written to {store}: {exc}") from exc
    return VersionDirectory(target, manifest)


def _write_lora(store: Path, model: Any, info: VersionInfo, trunk: Path) -> VersionDirectory:
    """A LoRA's version has its trunk's files beside its own; the store links those that it has already."""
    with tempfile.TemporaryDirectory(prefix="trimtab-lora-") as name:
        save_lora(model, Path(name))
        manifest, path = VersionStore(store).add(
            Path(name),
            name=info.name,
            trunk=trunk,
            prefix_token_ids=info.prefix_token_ids,
            default_alpha=info.alpha,
            training=info.training,
            described={
                "reward": info.reward,
                "evaluation": info.evaluation,
                "created_at": info.created_at or _now(),
            },
        )
    return VersionDirectory(path, manifest)


def register_version(gateway: GatewayClient, directory: VersionDirectory) -> VersionId:
    """Register a version with the gateway, which must see the directory under the same path.

    Raises:
        IntegrityError: The gateway found another content than was written.
    """
    version = gateway.register(directory.manifest.name, str(directory.path.resolve()))
    if version != directory.version:
        raise IntegrityError(f"the gateway registered version {version} instead of {directory.version}")
    return version


@contextlib.contextmanager
def temporary_version(
    gateway: GatewayClient, store: Path, model: Any, vocabulary: Vocabulary, info: VersionInfo
) -> Iterator[NamedVersion]:
    """Publish a model for as long as the context lasts; then retire the version and delete its directory."""
    directory = write_version(store, model, vocabulary, info)
    try:
        version = register_version(gateway, directory)
        try:
            yield NamedVersion(name=info.name, version=version, alpha=info.alpha)
        finally:
            try:
                gateway.retire(info.name, version)
            except TrimtabError as exc:  # what was drawn is good; a version that stays registered only costs memory
                logger.warning("the intermediate version %s could not be retired: %s", version, exc)
    finally:
        shutil.rmtree(directory.path, ignore_errors=True)


def first_time(path: Path) -> str:
    """When a run came to its end first, kept in `path`: publishing again after a kill gives the same version again."""
    if not path.exists():
        write_whole(path, _now())
    return path.read_text(encoding="utf-8")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def sweep(output_dir: Path, gateway: GatewayClient | None) -> None:
    """Retire and delete what a run that was killed left in its directory, other than its results."""
    for store in (VERSIONS, INTERMEDIATE):
        for path in (output_dir / store).glob(f"{_TEMPORARY}*"):
            shutil.rmtree(path, ignore_errors=True)
    for path in (output_dir / INTERMEDIATE).glob("*"):
        if gateway is not None:
            try:
                manifest = read_manifest(path)
                gateway.retire(manifest.name, manifest.version_id)
            except (ManifestError, NotFoundError, ConflictError) as exc:
                logger.info("%s was not in use: %s", path, exc.message)
        shutil.rmtree(path, ignore_errors=True)


def _manifest(directory: Path, vocabulary: Vocabulary, info: VersionInfo) -> Manifest:
    return Manifest(
        name=info.name,
        vocabulary_sha256=vocabulary.sha256,
        vocab_size=vocabulary.size,
        prefix_token_ids=list(info.prefix_token_ids),
        default_alpha=info.alpha,
        created_at=info.created_at or _now(),
        training=info.training,
        reward=info.reward,
        evaluation=info.evaluation,
        files={path.name: _entry(path) for path in sorted(directory.iterdir())},
    )


def _entry(path: Path) -> FileEntry:
    with path.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return FileEntry(sha256=digest, size_bytes=os.path.getsize(path))
