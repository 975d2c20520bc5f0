"""Adapter versions in an engine's memory: prepare, commit, retire.

Prepare reads a version in a background thread while decoding goes on, and checks it in small steps on the worker's own
thread, because an engine's operators need not be safe for two threads. Commit makes it usable by putting
a pointer into a dictionary, between two steps. Retire takes it out; the memory goes with the last row that holds it.
"""

import logging
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trimtab_adapters.adapter_lm import Backend, PackedLM, UncheckedAdapterLM, UncheckedLM, read_adapter_lm
from trimtab_adapters.background import in_background
from trimtab_adapters.contract.engine_api import CacheStatus, LoadedVersion, VersionActivity, WeightStatus
from trimtab_adapters.contract.errors import (
    AdapterError,
    AdapterMemoryFullError,
    AdapterTooLargeError,
    ConflictError,
    ManifestError,
    NotFoundError,
    TrimtabError,
    VocabularyError,
)
from trimtab_adapters.contract.manifest import Manifest, read_manifest
from trimtab_adapters.contract.params import VersionId
from trimtab_adapters.expert import Expert
from trimtab_adapters.kv_pool import BLOCK_SIZE, KvBudget, KvGeometry, KvPool, PoolExhaustedError
from trimtab_adapters.trunks import Trunks
from trimtab_adapters.weight_budget import Reservation, WeightBudget, added_bytes

logger = logging.getLogger(__name__)

MEMORY_CODES = (AdapterMemoryFullError.default_code, AdapterTooLargeError.default_code)


_CHECK_SLICE_S = 0.005
"""How long one `poll` may go on checking a version that was read; a step of the check may take longer."""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """What an adapter version must fit."""

    vocab_size: int
    """V, width of the base's logits."""
    num_tokens: int
    """Tokens of the base's tokenizer."""
    vocabulary_sha256: str
    max_model_len: int


class ResidentVersion(Expert):
    """A loaded adapter version with its share of a KV pool."""

    def __init__(self, manifest: Manifest, adapter: PackedLM, pool: KvPool, base: BaseModel) -> None:
        super().__init__(
            manifest.version_id,
            adapter,
            pool,
            prefix=manifest.prefix_token_ids,
            num_known=min(adapter.num_logits, base.vocab_size, base.num_tokens),
            cache_root=bytes.fromhex(manifest.digest),
        )
        self.manifest = manifest
        self.reservation: Reservation | None = None

    def describe(self, state: str = "committed") -> LoadedVersion:
        """For status reports."""
        cache, activity = self.pool.of_root(self.cache_root), self.activity
        return LoadedVersion.model_validate(
            {
                "version": self.version,
                "name": self.manifest.name,
                "state": state,
                "weight_bytes": self.adapter.weight_bytes,
                "cache_bytes": cache.num_blocks * self.pool.geometry.block_bytes,
                "active_rows": self.num_rows,
                "activity": VersionActivity(
                    steps=activity.steps,
                    step_seconds=activity.step_seconds,
                    rows=activity.rows,
                    hit_tokens=cache.hit_tokens,
                    computed_tokens=cache.computed_tokens,
                    recomputed_tokens=cache.recomputed_tokens,
                ),
            }
        )


@dataclass(slots=True)
class _Load:
    """A version on its way in: read in a thread, then checked step by step on the worker's own."""

    reservation: Reservation
    future: Future[tuple[Manifest, UncheckedLM]]
    check: Generator[None, None, PackedLM] | None = None

    def drop(self) -> None:
        """Throw away what nobody wants any more; reading goes on to its end, because a thread cannot be stopped."""
        self.future.add_done_callback(lambda _: self._free())

    def _free(self) -> None:
        if self.future.exception() is None:
            self.future.result()[1].free()
        self.reservation.release()


class Residents:
    """The versions in memory and the pools that they share.

    `committed` is the mapping that the steering core reads. All methods are called from the engine's one worker
    thread; only loading itself happens in a background thread.

    Args:
        base: What adapters must fit.
        device: Where they run.
        kv_bytes: Budget of their KV cache.
        weight_bytes: Budget of their weights; None means no bound.
        dtype: Type of weights and cache; each directory's own when None.
        backend: What the engine offers to compute with.
    """

    def __init__(
        self,
        base: BaseModel,
        device: torch.device,
        *,
        kv_bytes: int,
        weight_bytes: int | None = None,
        dtype: torch.dtype | None = None,
        backend: Backend | None = None,
    ) -> None:
        self.base = base
        self.device = device
        self.dtype = dtype
        self.backend = backend
        self.budget = KvBudget(kv_bytes)
        self.weights = WeightBudget(weight_bytes)
        self._trunks = Trunks(self._read_lm, self.weights, dtype)
        self.committed: dict[VersionId, ResidentVersion] = {}
        self._loading: dict[VersionId, _Load] = {}
        self._prepared: dict[VersionId, ResidentVersion] = {}
        self._retiring: dict[VersionId, ResidentVersion] = {}
        self._failed: dict[VersionId, LoadedVersion] = {}
        self._pools: dict[KvGeometry, KvPool] = {}
        self.reclaim: Callable[[], bool] | None = None
        """Gives KV memory back that is not needed now; whether there was any."""

    def prepare(self, version: VersionId, path: str) -> None:
        """Start loading a version; ask `poll` how it goes. Asking again for one that is there does nothing."""
        if version in self.committed or version in self._prepared or version in self._loading:
            return
        if version in self._retiring:  # wanted again before its last row ended
            self._prepared[version] = self._retiring.pop(version)
            return
        self._failed.pop(version, None)
        load = self._loading[version] = _Load(self.weights.reserve(), Future())
        threading.Thread(
            target=self._read_quietly, args=(version, Path(path), load), name=f"load-{version}", daemon=True
        ).start()

    def _read_lm(self, directory: Path, *, change: Callable[[Any], None] | None = None) -> UncheckedAdapterLM:
        return read_adapter_lm(directory, self.device, dtype=self.dtype, backend=self.backend, change=change)

    def _read_quietly(self, version: VersionId, path: Path, load: _Load) -> None:
        with in_background():
            self._read(version, path, load)

    def _read(self, version: VersionId, path: Path, load: _Load) -> None:
        """Everything that does not need the engine's operators, in a thread of its own."""
        try:
            manifest = read_manifest(path)
            if manifest.version_id != version:
                raise ManifestError(f"{path} holds version {manifest.version_id}, not {version}")
            check_vocabulary(manifest, self.base)
            load.reservation.resize(added_bytes(manifest, path, self.dtype))
            if manifest.lora is None:
                unchecked: UncheckedLM = self._read_lm(path)
            else:
                unchecked = self._trunks.read(manifest, path, load.reservation)
            try:
                check_fit(manifest, unchecked.shape, self.base)
                if manifest.lora is None:
                    load.reservation.resize(unchecked.shape.weight_bytes)
            except TrimtabError:
                unchecked.free()
                raise
        except Exception as exc:  # noqa: BLE001 - handed to the caller of `poll`, which translates it
            load.reservation.release()
            load.future.set_exception(exc)
            return
        load.future.set_result((manifest, unchecked))

    def poll(self, version: VersionId) -> LoadedVersion:
        """State of a version that was prepared. One that was read is checked here, a few milliseconds at each call.

        Raises:
            NotFoundError: It was never prepared here, or was freed.
        """
        if version in self._loading and self._loading[version].future.done():
            self._check(version)
        for state, group in (
            ("committed", self.committed),
            ("prepared", self._prepared),
            ("retiring", self._retiring),
        ):
            if version in group:
                return group[version].describe(state)
        if version in self._failed:
            return self._failed[version]
        if version in self._loading:
            reserved = self._loading[version].reservation.num_bytes
            return LoadedVersion(version=version, name="", state="loading", weight_bytes=reserved)
        raise NotFoundError(f"adapter version {version} is not loaded in this engine")

    def _check(self, version: VersionId) -> None:
        load = self._loading[version]
        deadline = time.perf_counter() + _CHECK_SLICE_S
        try:
            manifest, unchecked = load.future.result()
            load.check = load.check or unchecked.check()
            adapter = _advance(load.check, deadline)
            if adapter is None:
                return
            load.reservation.resize(adapter.weight_bytes)
            resident = ResidentVersion(manifest, adapter, self._pool(adapter.geometry), self.base)
            resident.reservation = load.reservation
            self._prepared[version] = resident
            del self._loading[version]
            return
        except (TrimtabError, PoolExhaustedError) as exc:
            failure = _failure(version, str(exc), getattr(exc, "code", None))
        except Exception as exc:  # whatever loading raised must reach the admin, not kill the engine
            logger.exception("loading adapter version %s failed", version)
            failure = _failure(version, f"{type(exc).__name__}: {exc}", None)
        del self._loading[version]
        load.drop()
        if failure.error_code in MEMORY_CODES:
            failure.weight_bytes = load.reservation.wanted_bytes
        self._failed[version] = failure

    def _pool(self, geometry: KvGeometry) -> KvPool:
        pool = self._pools.get(geometry)
        if pool is None:
            try:
                pool = KvPool(geometry, self.budget, self.device)
            except PoolExhaustedError:
                if self.reclaim is None or not self.reclaim():
                    raise
                pool = KvPool(geometry, self.budget, self.device)
            self._pools[geometry] = pool
        return pool

    def commit(self, version: VersionId) -> LoadedVersion:
        """Make a prepared version usable from the next step on.

        Raises:
            ConflictError: It is not prepared (yet), or loading failed.
            NotFoundError: It was never prepared.
        """
        status = self.poll(version)
        if status.state in ("loading", "failed"):
            raise ConflictError(f"adapter version {version} cannot be committed: {status.error or 'still loading'}")
        resident = self._prepared.pop(version, None) or self._retiring.pop(version, None)
        if resident is not None:
            resident.is_usable = True
            self.committed[version] = resident
        return self.committed[version].describe()

    def retire(self, version: VersionId) -> int:
        """Refuse new rows for a version; free it at once or with its last row. Returns the rows that still hold it."""
        self._failed.pop(version, None)
        if (loading := self._loading.pop(version, None)) is not None:
            loading.drop()
            return 0
        # One that was prepared may have rows too: those that it had when it was wanted again before they ended.
        resident = self.committed.pop(version, None) or self._prepared.pop(version, None) or self._retiring.get(version)
        if resident is None:
            return 0
        resident.is_usable = False
        self._retiring[version] = resident
        del resident
        self.sweep()
        return self._retiring[version].num_rows if version in self._retiring else 0

    def sweep(self) -> None:
        """Free retired versions that no row holds any more, and pools that no version uses."""
        done = [version for version, resident in self._retiring.items() if resident.num_rows == 0]
        if not done:
            return
        for version in done:
            resident = self._retiring.pop(version)
            resident.pool.forget(resident.cache_root)
            resident.adapter.free()
            if resident.reservation is not None:
                resident.reservation.release()
        alive = {r.pool.geometry for group in (self.committed, self._prepared, self._retiring) for r in group.values()}
        for geometry in [g for g in self._pools if g not in alive]:
            pool = self._pools.pop(geometry)
            self.budget.allocated_bytes -= pool.num_blocks * geometry.block_bytes

    def versions(self) -> list[LoadedVersion]:
        """All versions in whatever state, for the status report."""
        names = [*self.committed, *self._prepared, *self._retiring, *self._loading, *self._failed]
        return [self.poll(version) for version in names]

    def weight_status(self) -> WeightStatus:
        """Memory of the weights of all versions together."""
        used = self.weights.used_bytes + self._trunks.stack_bytes
        return WeightStatus(budget_bytes=self.weights.total_bytes, used_bytes=used)

    def cache_status(self) -> CacheStatus:
        """The KV cache of all pools together."""
        pools = list(self._pools.values())
        return CacheStatus(
            budget_bytes=self.budget.total_bytes,
            allocated_bytes=self.budget.allocated_bytes,
            used_blocks=sum(p.num_used for p in pools),
            cached_blocks=sum(p.num_cached for p in pools),
            total_blocks=sum(p.num_blocks - 1 for p in pools),
            block_size=BLOCK_SIZE,
            hit_tokens=sum(p.counters.hit_tokens for p in pools),
            computed_tokens=sum(p.counters.computed_tokens for p in pools),
            recomputed_tokens=sum(p.counters.recomputed_tokens for p in pools),
        )


def _advance(check: Generator[None, None, PackedLM], deadline: float) -> PackedLM | None:
    """Go on with a check until this time; what it returns when it is over."""
    while True:
        try:
            next(check)
        except StopIteration as done:
            adapter: PackedLM = done.value
            return adapter
        if time.perf_counter() >= deadline:
            return None


def _failure(version: VersionId, message: str, code: str | None) -> LoadedVersion:
    return LoadedVersion(version=version, name="", state="failed", error=message, error_code=code)


def check_vocabulary(manifest: Manifest, base: BaseModel) -> None:
    """Refuse an adapter made for another tokenizer.

    Raises:
        VocabularyError: The fingerprints differ.
    """
    if manifest.vocabulary_sha256 != base.vocabulary_sha256:
        raise VocabularyError(
            f"the adapter LM was made for another tokenizer (fingerprint {manifest.vocabulary_sha256[:12]}, "
            f"{manifest.vocab_size} tokens) than the base model's ({base.vocabulary_sha256[:12]}, {base.num_tokens})"
        )


def check_fit(manifest: Manifest, adapter: PackedLM, base: BaseModel) -> None:
    """Refuse an adapter that cannot follow the base to the end of its context.

    Raises:
        AdapterError: Its logits are narrower than the tokenizer, a prefix id is unknown to it, or its context is short.
    """
    if adapter.num_logits < min(base.num_tokens, base.vocab_size):
        raise AdapterError(
            f"the adapter LM has logits for {adapter.num_logits} tokens, the tokenizer has {base.num_tokens}"
        )
    unknown = [token for token in manifest.prefix_token_ids if token >= adapter.num_logits]
    if unknown:
        raise AdapterError(f"prefix token ids {unknown[:5]} are beyond the adapter LM's {adapter.num_logits} tokens")
    needed = len(manifest.prefix_token_ids) + base.max_model_len
    if adapter.max_length < needed:
        raise AdapterError(
            f"the adapter LM allows {adapter.max_length} positions, but its prefix and the engine's --max-model-len "
            f"{base.max_model_len} need {needed}; start the engine with a shorter --max-model-len"
        )
