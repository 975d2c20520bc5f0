"""LMs that several LoRAs share: each is in memory once, by content, as long as one of its LoRAs is."""

import json
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from trimtab_adapters.adapter_lm import AdapterLM, PackedLM
from trimtab_adapters.contract.manifest import Manifest
from trimtab_adapters.lean_decoder import FAMILIES
from trimtab_adapters.lora_layers import LoraStacks
from trimtab_adapters.lora_lm import load_lora
from trimtab_adapters.lora_weights import merge, read_lora
from trimtab_adapters.weight_budget import Reservation, WeightBudget, trunk_bytes

logger = logging.getLogger(__name__)


class LoadLM(Protocol):
    """`load_adapter_lm` with everything but these fixed."""

    def __call__(self, directory: Path, *, change: Callable[[Any], None] | None = None) -> AdapterLM:
        """Load the LM of a directory; `change` may change its weights first."""


@dataclass(slots=True)
class _Trunk:
    """A LM that is in memory or on its way there, and how many LoRAs need it."""

    reservation: Reservation
    model: "Future[AdapterLM]" = field(default_factory=Future)
    stacks: LoraStacks | None = None
    num_users: int = 0


class Trunks:
    """The shared LMs. Several threads may load at the same time.

    Args:
        load: Loads a LM.
        budget: Holds the LMs' bytes, once each.
        dtype: Type of their weights; each directory's own when None.
    """

    def __init__(self, load: LoadLM, budget: WeightBudget | None = None, dtype: torch.dtype | None = None) -> None:
        self._load = load
        self._budget = budget or WeightBudget()
        self._dtype = dtype
        self._lock = threading.Lock()
        self._trunks: dict[str, _Trunk] = {}

    @property
    def stack_bytes(self) -> int:
        """Memory of what is kept beside the LMs for the LoRAs that run together. It comes and goes with requests."""
        with self._lock:
            return sum(trunk.stacks.weight_bytes for trunk in self._trunks.values() if trunk.stacks is not None)

    def load(self, manifest: Manifest, directory: Path) -> PackedLM:
        """The LoRA of a version directory, on a LM that is loaded if no other LoRA has loaded it.

        Where a LM's layers are not ours, the LoRA is merged into a copy of the LM's weights: right, but not shared.
        Free what is returned, or the LM stays.

        Raises:
            AdapterError: The LoRA, or the LM, is refused.
        """
        assert manifest.lora is not None, "not a LoRA"
        key = manifest.lora.trunk_sha256
        if _is_our_family(directory):
            trunk = self._acquire(key, directory)
            try:
                model = trunk.model.result()
                if model.lean is not None:
                    assert trunk.stacks is not None, "made with the LM"
                    return load_lora(directory, model, trunk.stacks, lambda: self._release(key))
            except BaseException:
                self._release(key)
                raise
            self._release(key)
        config, updates = read_lora(directory)
        logger.warning(
            "the LM under the LoRA %s does not run on our own layers: the LoRA is merged into a copy of it, which is "
            "not shared with other LoRAs",
            manifest.name,
        )
        return self._load(directory, change=lambda merged: merge(merged, config, updates))

    def _acquire(self, key: str, directory: Path) -> _Trunk:
        """Count a user. The first one loads the LM, the others wait for it; failures are in the future."""
        with self._lock:
            is_first = key not in self._trunks
            trunk = self._trunks.setdefault(key, _Trunk(self._budget.reserve()))
            trunk.num_users += 1
        if is_first:
            try:
                trunk.reservation.resize(trunk_bytes(directory, self._dtype))
                model = self._load(directory)
                trunk.reservation.resize(model.weight_bytes)
                trunk.stacks = LoraStacks(model.dense, model.device)
                trunk.model.set_result(model)
            except BaseException as exc:  # noqa: BLE001 - raised again in every thread that waits
                trunk.model.set_exception(exc)
        return trunk

    def _release(self, key: str) -> None:
        """Give up a use; the last one frees the LM."""
        with self._lock:
            trunk = self._trunks[key]
            trunk.num_users -= 1
            if trunk.num_users:
                return
            del self._trunks[key]
        trunk.reservation.release()
        if trunk.model.exception() is None:
            trunk.model.result().free()


def _is_our_family(directory: Path) -> bool:
    """Whether the LM may run on our own layers, by its configuration."""
    try:
        architectures = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("architectures")
    except (OSError, ValueError, AttributeError):
        return False  # the attempt to load it says what is wrong
    return bool(architectures) and architectures[0] in FAMILIES
