"""LMs that several LoRAs share: each is in memory once, by content, as long as one of its LoRAs is."""

import json
import logging
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from typing_extensions import override

from trimtab_adapters.adapter_lm import AdapterLM, UncheckedAdapterLM, UncheckedLM
from trimtab_adapters.contract.errors import AdapterError, AdapterMemoryFullError, AdapterTooLargeError
from trimtab_adapters.contract.lora import LoraConfig
from trimtab_adapters.contract.manifest import Manifest
from trimtab_adapters.lean_decoder import FAMILIES, LeanDecoder
from trimtab_adapters.lora_layers import LoraStacks
from trimtab_adapters.lora_lm import LoraLM, check_lora
from trimtab_adapters.lora_weights import LowRank, merge, read_lora
from trimtab_adapters.weight_budget import Reservation, WeightBudget, trunk_bytes

logger = logging.getLogger(__name__)


class ReadLM(Protocol):
    """`read_adapter_lm` with everything but these fixed."""

    def __call__(self, directory: Path, *, change: Callable[[Any], None] | None = None) -> UncheckedAdapterLM:
        """Read the LM of a directory; `change` may change its weights first."""


@dataclass(slots=True)
class _Trunk:
    """A LM that is in memory or on its way there, and how many LoRAs need it.

    Attributes:
        reservation: Its bytes.
        unchecked: Between reading and the end of the check; what it refers to is large.
        is_ours: Whether our own layers are written for it.
    """

    reservation: Reservation
    read: "Future[AdapterLM]" = field(default_factory=Future)
    unchecked: UncheckedAdapterLM | None = None
    is_ours: bool = False
    stacks: LoraStacks | None = None
    num_users: int = 0
    _check: "Generator[None, None, AdapterLM] | None" = None
    _error: Exception | None = None

    def check(self) -> Iterator[None]:
        """Check the LM, a step at a time; its LoRAs take turns until one of them has made the last step.

        Raises:
            AdapterError: It is refused, now or when another LoRA made the step.
        """
        while self.unchecked is not None:
            if self._error is not None:
                raise AdapterError(f"the LM under the LoRA is refused: {self._error}")
            self._check = self._check or self.unchecked.check()
            try:
                next(self._check)
            except StopIteration:
                self.unchecked = self._check = None
            except Exception as exc:
                self._error = exc
                raise
            yield


class UncheckedLora(UncheckedLM):
    """A LoRA that was read, with its part in a trunk.

    Args:
        trunk: Read.
        config: Of the LoRA.
        updates: Its matrices.
        release: Gives up its use of the trunk.
    """

    def __init__(
        self, trunk: _Trunk, config: LoraConfig, updates: Mapping[str, LowRank], release: Callable[[], None]
    ) -> None:
        self._trunk = trunk
        self._config = config
        self._updates = updates
        self._release: Callable[[], None] | None = release

    @property
    @override
    def shape(self) -> AdapterLM:
        return self._trunk.read.result()

    @override
    def check(self) -> Generator[None, None, LoraLM]:
        yield from self._trunk.check()
        assert self._trunk.stacks is not None, "made when the LM was read"
        return (yield from check_lora(self._config, self._updates, self.shape, self._trunk.stacks, self.free))

    @override
    def free(self) -> None:
        release, self._release = self._release, None
        if release is not None:
            release()


class Trunks:
    """The shared LMs. Several threads may read at the same time; checks are made on one.

    Args:
        read: Reads a LM.
        budget: Holds the LMs' bytes, once each.
        dtype: Type of their weights; each directory's own when None.
    """

    def __init__(self, read: ReadLM, budget: WeightBudget | None = None, dtype: torch.dtype | None = None) -> None:
        self._read = read
        self._budget = budget or WeightBudget()
        self._dtype = dtype
        self._lock = threading.Lock()
        self._trunks: dict[str, _Trunk] = {}

    @property
    def stack_bytes(self) -> int:
        """Memory of what is kept beside the LMs for the LoRAs that run together. It comes and goes with requests."""
        with self._lock:
            return sum(trunk.stacks.weight_bytes for trunk in self._trunks.values() if trunk.stacks is not None)

    def read(self, manifest: Manifest, directory: Path, reservation: Reservation) -> UncheckedLM:
        """The LoRA of a version directory, with a LM that is read if no other LoRA has read it.

        Where a LM's layers are not ours, the LoRA is merged into a copy of the LM's weights: right, but not shared.
        Free what comes of it, or the LM stays.

        Args:
            manifest: Of a LoRA.
            directory: The version's.
            reservation: Of the LoRA's own bytes. Where the LM finds no room, what both want together is noted there:
                who makes room must not be told of the LoRA alone.

        Raises:
            AdapterError: The LoRA, or the LM, is refused.
        """
        assert manifest.lora is not None, "not a LoRA"
        config, updates = read_lora(directory)
        if _is_our_family(directory):
            key = manifest.lora.trunk_sha256
            trunk = self._acquire(key, directory)
            try:
                if isinstance(trunk.read.exception(), AdapterMemoryFullError | AdapterTooLargeError):
                    reservation.wanted_bytes += trunk.reservation.wanted_bytes
                trunk.read.result()
                if trunk.is_ours:
                    return UncheckedLora(trunk, config, updates, lambda: self._give_up(key))
            except BaseException:
                self._give_up(key)
                raise
            self._give_up(key)
        logger.warning(
            "the LM under the LoRA %s does not run on our own layers: the LoRA is merged into a copy of it, which is "
            "not shared with other LoRAs",
            manifest.name,
        )
        return self._read(directory, change=lambda merged: merge(merged, config, updates))

    def _acquire(self, key: str, directory: Path) -> _Trunk:
        """Count a user. The first one reads the LM, the others wait for it; failures are in the future."""
        with self._lock:
            is_first = key not in self._trunks
            trunk = self._trunks.setdefault(key, _Trunk(self._budget.reserve()))
            trunk.num_users += 1
        if is_first:
            try:
                trunk.reservation.resize(trunk_bytes(directory, self._dtype))
                unchecked = trunk.unchecked = self._read(directory)
                model = unchecked.adapter
                trunk.reservation.resize(model.weight_bytes)
                trunk.is_ours = LeanDecoder.supports(unchecked.model)
                trunk.stacks = LoraStacks(model.dense, model.device)
                trunk.read.set_result(model)
            except BaseException as exc:  # noqa: BLE001 - raised again in every thread that waits
                trunk.read.set_exception(exc)
        return trunk

    def _give_up(self, key: str) -> None:
        """Give up a use; the last one frees the LM."""
        with self._lock:
            trunk = self._trunks[key]
            trunk.num_users -= 1
            if trunk.num_users:
                return
            del self._trunks[key]
        trunk.reservation.release()
        if trunk.unchecked is not None:
            trunk.unchecked.free()
        elif trunk.read.exception() is None:
            trunk.read.result().free()


def _is_our_family(directory: Path) -> bool:
    """Whether the LM may run on our own layers, by its configuration."""
    try:
        architectures = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("architectures")
    except (OSError, ValueError, AttributeError):
        return False  # the attempt to load it says what is wrong
    return bool(architectures) and architectures[0] in FAMILIES
