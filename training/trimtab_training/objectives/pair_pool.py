"""BoNBoN's pool of pairs: never emptied, gone through in shuffled passes."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimtab_training.objectives.objective import ObjectiveState, TokenIds
from trimtab_training.ragged import pack_ragged, unpack_ragged

_FIELDS = ("prompt_token_ids", "best_token_ids", "worst_token_ids")


@dataclass(frozen=True, slots=True)
class Pair:
    """The best and the worst of the outputs for one prompt; no list is empty."""

    prompt_token_ids: TokenIds
    best_token_ids: TokenIds
    worst_token_ids: TokenIds


class PairPool:
    """All pairs so far.

    Args:
        seed: Of the shuffling.
    """

    def __init__(self, *, seed: int) -> None:
        self._pairs: list[Pair] = []
        self._rng = np.random.default_rng(seed)
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._cursor = 0

    def __len__(self) -> int:
        return len(self._pairs)

    def add(self, pairs: Iterable[Pair]) -> None:
        """Add pairs and begin a new pass."""
        self._pairs.extend(pairs)
        self._begin_pass()

    def draw(self, num_pairs: int) -> list[Pair]:
        """The next pairs; a pass that ends among them is followed by a new one.

        Raises:
            ValueError: The pool is empty.
        """
        if not self._pairs:
            raise ValueError("the pool is empty")
        drawn: list[Pair] = []
        while len(drawn) < num_pairs:
            if self._cursor == len(self._order):
                self._begin_pass()
            taken = self._order[self._cursor : self._cursor + num_pairs - len(drawn)]
            self._cursor += len(taken)
            drawn.extend(self._pairs[number] for number in taken.tolist())
        return drawn

    def _begin_pass(self) -> None:
        self._order = self._rng.permutation(len(self._pairs)).astype(np.int64)
        self._cursor = 0

    def state(self) -> ObjectiveState:
        """Everything, for a checkpoint."""
        arrays: dict[str, NDArray[Any]] = {"order": self._order}
        for name in _FIELDS:
            arrays[name], arrays[f"{name}_lengths"] = pack_ragged(
                [getattr(pair, name) for pair in self._pairs], np.int64
            )
        return ObjectiveState(arrays, {"cursor": self._cursor, "rng": json.dumps(self._rng.bit_generator.state)})

    def load_state(self, state: ObjectiveState) -> None:
        """Go on from `state`. Raises `KeyError` or `ValueError` where it does not fit."""
        columns = [unpack_ragged(state.arrays[name], state.arrays[f"{name}_lengths"]) for name in _FIELDS]
        self._pairs = [Pair(*fields) for fields in zip(*columns, strict=True)]
        self._order = np.asarray(state.arrays["order"], dtype=np.int64)
        self._cursor = int(state.values["cursor"])
        self._rng.bit_generator.state = json.loads(state.values["rng"])
