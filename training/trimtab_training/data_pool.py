"""Quark's pool of scored outputs: never emptied, cut anew into reward quantiles whenever it grows.

Plain numpy, no torch. See methods A.3 of IPA's training loop (arXiv 2305.15065) and Quark (arXiv 2205.13636).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from trimtab_training.ragged import pack_ragged, unpack_ragged


@dataclass(frozen=True, slots=True)
class PoolItem:
    """One scored output. Both id lists are non-empty; `reward` is finite."""

    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]
    reward: float


@dataclass(frozen=True, slots=True)
class PoolRow:
    """An item as it was drawn, with its quantile at that time; bin 0 is the best."""

    item: PoolItem
    bin: int


def quantile_bins(rewards: NDArray[np.float64], num_bins: int) -> NDArray[np.int64]:
    """The quantile of each reward, `[items]` -> `[items]`, 0 for the best.

    Every bin holds `items // num_bins`; the remainder goes to the worst bin. Equal rewards keep their order, so at an
    edge the earlier item is in the better bin.
    """
    order = np.argsort(-rewards, kind="stable")
    bin_size = len(rewards) // num_bins
    ranked = np.full(len(rewards), num_bins - 1, dtype=np.int64)
    if bin_size:
        ranked = np.minimum(np.arange(len(rewards)) // bin_size, num_bins - 1)
    bins = np.empty(len(rewards), dtype=np.int64)
    bins[order] = ranked
    return bins


class DataPool:
    """All scored outputs so far, drawn from in shuffled passes.

    Args:
        num_bins: Number of reward quantiles.
        seed: Of the shuffling.
    """

    def __init__(self, num_bins: int, *, seed: int) -> None:
        if num_bins < 1:
            raise ValueError("a pool needs at least one bin")
        self.num_bins = num_bins
        self._items: list[PoolItem] = []
        self._bins: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._rng = np.random.default_rng(seed)
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._cursor = 0

    def __len__(self) -> int:
        return len(self._items)

    @property
    def items(self) -> Sequence[PoolItem]:
        """In the order in which they came."""
        return tuple(self._items)

    @property
    def bins(self) -> NDArray[np.int64]:
        """The quantile of each item, `[items]`."""
        return self._bins.copy()

    @property
    def rewards(self) -> NDArray[np.float64]:
        """The reward of each item, `[items]`."""
        return np.array([item.reward for item in self._items], dtype=np.float64)

    def add(self, items: Iterable[PoolItem]) -> None:
        """Add items, cut everything into quantiles anew and begin a new pass.

        Raises:
            ValueError: An item is empty or its reward is not finite; nothing is added then.
        """
        new = list(items)
        for item in new:
            if not item.prompt_token_ids or not item.output_token_ids:
                raise ValueError("a pool item needs at least one prompt token and one output token")
            if not np.isfinite(item.reward):
                raise ValueError(f"the reward {item.reward} of a pool item is not finite")
        self._items.extend(new)
        self._bins = quantile_bins(self.rewards, self.num_bins)
        self._begin_pass()

    def draw(self, batch_size: int) -> list[PoolRow]:
        """The next rows of the current pass; a pass that ends inside a batch is followed by a new one.

        Raises:
            ValueError: The pool is empty.
        """
        if not self._items:
            raise ValueError("the pool is empty")
        chosen: list[int] = []
        while len(chosen) < batch_size:
            if self._cursor == len(self._order):
                self._begin_pass()
            taken = self._order[self._cursor : self._cursor + batch_size - len(chosen)]
            self._cursor += len(taken)
            chosen.extend(int(index) for index in taken)
        return [PoolRow(self._items[i], int(self._bins[i])) for i in chosen]

    def _begin_pass(self) -> None:
        self._order = self._rng.permutation(len(self._items))
        self._cursor = 0

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The items and the position in the pass, as plain arrays for a checkpoint."""
        prompts, prompt_lengths = pack_ragged([item.prompt_token_ids for item in self._items], np.int32)
        outputs, output_lengths = pack_ragged([item.output_token_ids for item in self._items], np.int32)
        return {
            "prompt_ids": prompts,
            "prompt_lengths": prompt_lengths,
            "output_ids": outputs,
            "output_lengths": output_lengths,
            "rewards": self.rewards,
            "order": self._order,
            "cursor": np.array(self._cursor, dtype=np.int64),
        }

    def rng_state(self) -> dict[str, Any]:
        """State of the shuffling, JSON-able."""
        return dict(self._rng.bit_generator.state)

    @classmethod
    def restore(cls, num_bins: int, arrays: dict[str, NDArray[Any]], rng_state: dict[str, Any]) -> Self:
        """Rebuild from `arrays` and `rng_state`; draws then go on as if nothing had happened."""
        pool = cls(num_bins, seed=0)
        prompts = unpack_ragged(arrays["prompt_ids"], arrays["prompt_lengths"])
        outputs = unpack_ragged(arrays["output_ids"], arrays["output_lengths"])
        pool._items = [
            PoolItem(prompt, output, float(reward))
            for prompt, output, reward in zip(prompts, outputs, arrays["rewards"], strict=True)
        ]
        pool._bins = quantile_bins(pool.rewards, num_bins)
        pool._order = arrays["order"].astype(np.int64)
        pool._cursor = int(arrays["cursor"])
        pool._rng.bit_generator.state = rng_state
        return pool
