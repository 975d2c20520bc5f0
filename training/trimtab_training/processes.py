"""The processes that train one adapter together: each reads its share of a step's rows, all take the same step.

They hold the same weights, the same objective and the same random state; only gradients and figures are exchanged.
Rollouts are drawn, scored and published by the first one, which tells the others.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

_Value = TypeVar("_Value")


class Processes(Protocol):
    """A group of processes in lock-step."""

    @property
    def rank(self) -> int:
        """This one's number, from 0."""
        ...

    @property
    def num(self) -> int:
        """How many there are."""
        ...

    def add_up(self, figures: Mapping[str, float]) -> dict[str, float]:
        """Sums over the processes by name; a name that one of them lacks counts as 0 there."""
        ...

    def add_up_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes."""
        ...

    def from_first(self, value: _Value) -> _Value:
        """The first process's value; the others' is ignored."""
        ...


class SingleProcess:
    """A run in one process."""

    rank = 0
    num = 1

    def add_up(self, figures: Mapping[str, float]) -> dict[str, float]:
        """See `Processes`."""
        return dict(figures)

    def add_up_tensors(self, tensors: Sequence[Tensor]) -> None:
        """See `Processes`."""

    def from_first(self, value: _Value) -> _Value:
        """See `Processes`."""
        return value
