"""Attention of an adapter LM over the block pool, bound into transformers' own modules.

transformers lets a model's attention be replaced by name. Ours gets the new tokens of *all* rows packed into one
sequence of length T, writes their keys and values into the pool and lets each row attend to its own blocks. So every
linear layer sees one matrix of T rows, whatever mixture of decoding and prefilling rows the step has.

How keys and values lie in a block and how they are read is the kernel's business: `TorchKernel` runs everywhere, an
engine may bring a faster one for its device.

Letters: T new tokens of all rows, R rows, H query heads, K key/value heads, D head size.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface

from trimtab_adapters.kv_pool import BLOCK_SIZE, KvGeometry, KvPool, SequenceCache

ATTENTION_NAME = "trimtab_paged"


class AttentionKernel(Protocol):
    """Reads and writes the blocks of a pool. It has no state of its own; what a batch needs is in its plan."""

    def supports(self, geometry: KvGeometry, device: torch.device) -> bool:
        """Whether it can serve adapter LMs of this geometry on this device."""

    def write(self, batch: "PagedBatch", layer: int, keys: Tensor, values: Tensor) -> None:
        """Store the new tokens' keys and values, each `[T, K, D]`."""

    def plan(self, batch: "PagedBatch", num_heads: int, sliding_window: int | None) -> Any:
        """What is the same in all layers with this window, computed once a pass."""

    def attend(self, batch: "PagedBatch", plan: Any, layer: int, queries: Tensor, scaling: float) -> Tensor:
        """Attention of `[T, H, D]` queries over each row's own context, its new tokens included; `[T, H, D]`."""


class PagedBatch:
    """One packed forward pass: which tokens, where their keys go, and who looks at what.

    Args:
        pool: Where keys and values live.
        sequences: The rows, already extended by their new tokens.
        num_new: Number of new tokens of each row, at least 1.
        kernel: Reads and writes the pool's blocks.

    Attributes:
        lengths: `[R]` tokens of each row, new ones included; `num_new` `[R]` of them are new, and begin at `starts`
            `[R]` in the packed sequence. `tables` `[R, blocks]` holds block numbers, padded with 0. All on the host.
        token_ids: `[T]` the packed new tokens, with their `positions` `[T]` in their rows and `slots` `[T]`, the
            places of their keys in the pool counted in tokens. On the pool's device.
        last_index: `[R]` place of each row's last token in the packed sequence.
    """

    def __init__(
        self, pool: KvPool, sequences: Sequence[SequenceCache], num_new: Sequence[int], kernel: AttentionKernel
    ) -> None:
        self.pool = pool
        self.kernel = kernel
        num_rows = len(sequences)
        self.lengths = np.fromiter((len(s.tokens) for s in sequences), np.int64, num_rows)
        self.num_new = new = np.asarray(num_new, np.int64)
        self.tables = tables = np.zeros((num_rows, max(len(s.blocks) for s in sequences)), np.int64)
        token_ids: list[int] = []
        for row, (sequence, count) in enumerate(zip(sequences, num_new, strict=True)):
            tables[row, : len(sequence.blocks)] = sequence.blocks
            token_ids.extend(sequence.tokens[-count:])
        self.starts = np.concatenate(([0], np.cumsum(new)[:-1]))
        row_of = np.repeat(np.arange(num_rows), new)
        positions = np.arange(len(token_ids)) - self.starts[row_of] + (self.lengths - new)[row_of]
        slots = tables[row_of, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        self._plans: dict[int | None, Any] = {}
        self.token_ids = self.to_device(np.asarray(token_ids, np.int64))
        self.positions = self.to_device(positions)
        self.slots = self.to_device(slots)
        self.last_index = self.to_device(self.starts + new - 1)

    @property
    def windows(self) -> set[int | None]:
        """Sliding windows that layers have asked for so far, None for full attention."""
        return set(self._plans)

    def to_device(self, values: "np.ndarray[Any, Any]") -> Tensor:
        """A host array on the pool's device."""
        return torch.from_numpy(values).to(self.pool.device, non_blocking=True)

    def attend(
        self,
        layer: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
    ) -> Tensor:
        """Store the new keys and values, `[T, K, D]`, and attend with `[T, H, D]` queries; returns `[T, H, D]`."""
        self.kernel.write(self, layer, keys, values)
        if sliding_window not in self._plans:
            self._plans[sliding_window] = self.kernel.plan(self, queries.shape[1], sliding_window)
        return self.kernel.attend(self, self._plans[sliding_window], layer, queries, scaling)


def paged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    trimtab_batch: PagedBatch | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in each layer: `[1, H, T, D]` in, `[1, T, H, D]` out.

    Raises:
        ValueError: The model wants an attention that this one does not implement.
    """
    if trimtab_batch is None:
        raise ValueError("paged attention was called without a batch")
    if softcap is not None or s_aux is not None:
        raise ValueError("soft-capped attention and attention sinks are not supported")
    output = trimtab_batch.attend(
        module.layer_idx,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window,
    )
    return output[None], None


AttentionInterface.register(ATTENTION_NAME, paged_attention)
