"""`Processes` over Hugging Face Accelerate: gloo between CPUs, NCCL between GPUs, one process group per run."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from trimtab_adapters.contract.errors import ProcessLostError

_LONGEST_WAIT = timedelta(days=30)
"""The others wait while the first one draws a round. One that dies is noticed at once, as its connections close."""

_Value = TypeVar("_Value")


class AccelerateProcesses:
    """This process among those of its group. All of them must make the same calls in the same order.

    All methods raise `ProcessLostError` when another process is gone.

    Args:
        state: Of a group that has been joined.
    """

    def __init__(self, state: PartialState) -> None:
        self._state = state

    @property
    def rank(self) -> int:
        """See `Processes`."""
        return int(self._state.process_index)

    @property
    def num(self) -> int:
        """See `Processes`."""
        return int(self._state.num_processes)

    def add_up(self, figures: Mapping[str, float]) -> dict[str, float]:
        """See `Processes`; added in the order of the ranks, so that all get the same bits."""
        with _translated():
            parts: list[dict[str, float]] = gather_object([dict(figures)])
        sums: Counter[str] = Counter()
        for part in parts:
            for name, value in part.items():
                sums[name] += value  # type: ignore[assignment]
        return dict(sums)

    def add_up_tensors(self, tensors: Sequence[Tensor]) -> None:
        """See `Processes`; exchanged as one tensor. All of them on one device and of one type."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with _translated():
            torch.distributed.all_reduce(flat)
        for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def from_first(self, value: _Value) -> _Value:
        """See `Processes`; the value is pickled."""
        with _translated():
            values: list[_Value] = broadcast_object_list([value])
        return values[0]


@contextmanager
def joined(*, rank: int, num: int, rendezvous: Path, device: str) -> Iterator[AccelerateProcesses]:
    """Join a group of processes of this machine, for as long as the context lasts. One group per process at a time.

    Args:
        rank: This one's number, from 0.
        num: How many there are; waits for all of them.
        rendezvous: A file that does not exist yet, the same for all.
        device: Torch device that the models are on.

    Raises:
        ProcessLostError: They did not find each other.
    """
    is_cpu = not device.startswith("cuda")
    # Accelerate reads who it is from what launchers set. OMP_NUM_THREADS keeps it from choosing a number of threads.
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num),
        "LOCAL_WORLD_SIZE": str(num),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(torch.get_num_threads())),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        "MASTER_PORT": os.environ.get("MASTER_PORT", "0"),  # not used: they meet at the file
    }
    with _environment(environment):
        try:
            with _translated():
                state = PartialState(
                    cpu=is_cpu,
                    backend=None if is_cpu else "cuda:nccl,cpu:gloo",
                    init_method=rendezvous.as_uri(),
                    rank=rank,
                    world_size=num,
                    timeout=_LONGEST_WAIT,
                )
            yield AccelerateProcesses(state)
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            PartialState._reset_state()  # it is shared by the whole process, and the next run is another group


@contextmanager
def _translated() -> Iterator[None]:
    """The boundary where the exceptions of torch's collectives become ours."""
    try:
        yield
    except RuntimeError as exc:  # gloo and NCCL have no others
        raise ProcessLostError("a process of the run is gone, so the others cannot go on") from exc


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
