"""The memory that the weights of all resident adapter versions may take together.

A version reserves its bytes before its weights are read, so that two versions that load at the same time do not both
take the last room; once it is loaded, the reservation is set to what it really takes. Whoever wants to load more has to
retire something first: the engine refuses, it never chooses. See `docs/decisions/0015-who-evicts.md`.
"""

import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from trimtab_adapters.contract.errors import AdapterMemoryFullError, AdapterTooLargeError
from trimtab_adapters.contract.manifest import LORA_WEIGHTS_FILE, Manifest
from trimtab_adapters.weights_file import tensor_bytes


class Reservation:
    """Bytes of one version, from before it is read until it is freed."""

    def __init__(self, budget: "WeightBudget") -> None:
        self._budget = budget
        self.num_bytes = 0
        """What is held."""
        self.wanted_bytes = 0
        """What was asked for last, refused or not."""

    def resize(self, num_bytes: int) -> None:
        """Hold so many bytes instead.

        Raises:
            AdapterTooLargeError: It is more than the whole budget.
            AdapterMemoryFullError: It is more than what is left. What was held stays held.
        """
        self.wanted_bytes = num_bytes
        self._budget._resize(self, num_bytes)

    def release(self) -> None:
        """Hold nothing. Harmless when repeated."""
        self._budget._resize(self, 0)


class WeightBudget:
    """Bytes that all versions together may take. Called from the worker's thread and from loading threads.

    Args:
        total_bytes: None means no bound.
    """

    def __init__(self, total_bytes: int | None = None) -> None:
        self.total_bytes = total_bytes
        self._used_bytes = 0
        self._lock = threading.Lock()

    @property
    def used_bytes(self) -> int:
        """Bytes that are reserved or taken."""
        return self._used_bytes

    def reserve(self) -> Reservation:
        """A reservation of nothing yet; give it its size with `Reservation.resize`."""
        return Reservation(self)

    def _resize(self, reservation: Reservation, num_bytes: int) -> None:
        with self._lock:
            used, total = self._used_bytes - reservation.num_bytes, self.total_bytes
            if total is not None and num_bytes > total:
                raise AdapterTooLargeError(
                    f"the adapter LM takes {num_bytes} bytes and the engine's whole adapter memory is {total} bytes; "
                    "start the engine with a larger --adapter-memory"
                )
            if total is not None and num_bytes > reservation.num_bytes and used + num_bytes > total:
                raise AdapterMemoryFullError(
                    f"the adapter memory is full: the budget is {total} bytes, {used} are taken, {num_bytes} are "
                    "needed; retire a version first, or start the engine with a larger --adapter-memory"
                )
            self._used_bytes = used + num_bytes
            reservation.num_bytes = num_bytes


def added_bytes(manifest: Manifest, directory: Path, dtype: torch.dtype | None) -> int:
    """Bytes that a version adds by itself, as far as the headers of its files tell; of a LoRA without its trunk.

    A missing file counts as nothing: loading says better what is wrong.

    Raises:
        WeightsError: A file is not in the safetensors format.
    """
    names = [name for name in manifest.files if name.endswith(".safetensors")]
    if manifest.lora is not None:
        names = [LORA_WEIGHTS_FILE]
    return _bytes([directory / name for name in names], dtype)


def trunk_bytes(directory: Path, dtype: torch.dtype | None) -> int:
    """Bytes of the LM under the LoRA of a version directory, as `added_bytes` counts them."""
    return _bytes([path for path in directory.glob("*.safetensors") if path.name != LORA_WEIGHTS_FILE], dtype)


def _bytes(files: Sequence[Path], dtype: torch.dtype | None) -> int:
    itemsize = dtype.itemsize if dtype is not None else None
    return sum(tensor_bytes(path, itemsize) for path in files if path.is_file())
