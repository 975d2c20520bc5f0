"""Attention of an adapter LM over the block pool, bound into transformers' own modules.

transformers lets a model's attention be replaced by name. Ours gets the new tokens of *all* rows packed into one
sequence of length T, writes their keys and values into the pool and lets each row attend to its own blocks. So every
linear layer sees one matrix of T rows, whatever mixture of decoding and prefilling rows the step has.

Letters: T new tokens of all rows, R rows, H query heads, K key/value heads, G = H / K, D head size, L longest context.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from trimtab_adapters.kv_pool import BLOCK_SIZE, KvPool, SequenceCache

ATTENTION_NAME = "trimtab_paged"
_MAX_SCORES = 1 << 24
"""Most attention scores (rows x heads x queries x keys) of one padded prefill group: bounds its memory to 64 MiB."""


@dataclass(frozen=True, slots=True)
class _RowGroup:
    """Rows that attend together, padded to the same number of queries and blocks.

    Attributes:
        query_index: `[R, Q]` positions in the packed sequence; padding repeats the row's first query.
        blocks: `[R * num_blocks]` block numbers, padded with 0.
        mask: `[R, 1, Q, L]` True where a query may look.
        is_query: `[R, Q]` False at padding, None when there is none.
    """

    query_index: Tensor
    blocks: Tensor
    mask: Tensor
    is_query: Tensor | None


class PagedBatch:
    """One packed forward pass: which tokens, where their keys go, and who looks at what.

    Args:
        pool: Where keys and values live.
        sequences: The rows, already extended by their new tokens.
        num_new: Number of new tokens of each row, at least 1.
        sliding_window: How far back a token may look, or None.
    """

    def __init__(self, pool: KvPool, sequences: Sequence[SequenceCache], num_new: Sequence[int]) -> None:
        self.pool = pool
        token_ids: list[int] = []
        lengths = np.fromiter((len(s.tokens) for s in sequences), np.int64, len(sequences))
        new = np.asarray(num_new, np.int64)
        for sequence, count in zip(sequences, num_new, strict=True):
            token_ids.extend(sequence.tokens[-count:])
        tables = np.zeros((len(sequences), max(len(s.blocks) for s in sequences)), np.int64)
        for row, sequence in enumerate(sequences):
            tables[row, : len(sequence.blocks)] = sequence.blocks
        starts = np.concatenate(([0], np.cumsum(new)[:-1]))
        row_of = np.repeat(np.arange(len(sequences)), new)
        positions = np.arange(len(token_ids)) - starts[row_of] + (lengths - new)[row_of]
        slots = tables[row_of, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        self._lengths, self._new, self._starts, self._tables = lengths, new, starts, tables
        self._groups: dict[int | None, list[_RowGroup]] = {}
        self.token_ids = self._to_device(np.asarray(token_ids, np.int64))
        self.positions = self._to_device(positions)
        self.slots = self._to_device(slots)
        self.last_index = self._to_device(starts + new - 1)

    def _to_device(self, values: "np.ndarray[Any, Any]") -> Tensor:
        return torch.from_numpy(values).to(self.pool.device, non_blocking=True)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store the new tokens' keys and values, each `[T, K, D]`."""
        for pooled, new in ((self.pool.keys[layer], keys), (self.pool.values[layer], values)):
            pooled.flatten(0, 1).index_copy_(0, self.slots, new.to(pooled.dtype))

    def attend(self, layer: int, queries: Tensor, scaling: float, sliding_window: int | None) -> Tensor:
        """Attention of `[T, H, D]` queries over each row's own context; returns `[T, H, D]`."""
        groups = self._groups.get(sliding_window)
        if groups is None:
            groups = self._groups[sliding_window] = self._build_groups(queries.shape[1], sliding_window)
        pool_keys, pool_values = self.pool.keys[layer], self.pool.values[layer]
        if len(groups) == 1 and groups[0].query_index.shape[1] == 1:
            return _attend_group(groups[0], queries, pool_keys, pool_values, scaling)[:, 0]
        output = torch.empty_like(queries)
        for group in groups:
            result = _attend_group(group, queries, pool_keys, pool_values, scaling)
            index = group.query_index
            if group.is_query is None:
                output[index.flatten()] = result.flatten(0, 1)
            else:
                output[index[group.is_query]] = result[group.is_query]
        return output

    def _build_groups(self, num_heads: int, sliding_window: int | None) -> list[_RowGroup]:
        order = np.lexsort((self._lengths, self._new))
        groups: list[_RowGroup] = []
        start = 0
        while start < len(order):
            stop = start + 1
            while stop < len(order) and self._fits(order[start : stop + 1], num_heads):
                stop += 1
            rows = order[start:stop]
            # With only decoding rows their order is kept, so that the result needs no scatter.
            groups.append(self._build_group(np.sort(rows), sliding_window))
            start = stop
        return groups

    def _fits(self, rows: "np.ndarray[Any, Any]", num_heads: int) -> bool:
        """Whether rows may share a padded group: all decoding, or similar prefills whose scores fit the bound."""
        shortest, longest = self._new[rows[0]], self._new[rows[-1]]
        if longest == 1:
            return True
        if shortest == 1 or longest > 2 * shortest:
            return False
        return bool(len(rows) * num_heads * longest * self._lengths[rows].max() <= _MAX_SCORES)

    def _build_group(self, rows: "np.ndarray[Any, Any]", sliding_window: int | None) -> _RowGroup:
        new, lengths = self._new[rows], self._lengths[rows]
        num_queries = int(new.max())
        num_blocks = int(-(-lengths.max() // BLOCK_SIZE))
        offset = np.arange(num_queries)
        is_query = offset < new[:, None]
        query_index = self._starts[rows][:, None] + np.where(is_query, offset, 0)
        query_position = (lengths - new)[:, None] + np.where(is_query, offset, 0)
        key_position = np.arange(num_blocks * BLOCK_SIZE)
        mask = key_position <= query_position[:, :, None]
        if sliding_window is not None:
            mask &= key_position > query_position[:, :, None] - sliding_window
        return _RowGroup(
            query_index=self._to_device(query_index),
            blocks=self._to_device(np.ascontiguousarray(self._tables[rows, :num_blocks]).reshape(-1)),
            mask=self._to_device(mask)[:, None],
            is_query=None if is_query.all() else self._to_device(is_query),
        )


def _attend_group(group: _RowGroup, queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Attention of one padded group, `[R, Q, H, D]`. Heads that share keys are folded into the query dimension."""
    num_rows, num_queries = group.query_index.shape
    num_kv_heads, head_dim = keys.shape[-2:]
    num_groups = queries.shape[1] // num_kv_heads
    q = queries[group.query_index.flatten()].view(num_rows, num_queries, num_kv_heads, num_groups, head_dim)
    q = q.permute(0, 2, 3, 1, 4).reshape(num_rows, num_kv_heads, num_groups * num_queries, head_dim)
    k = keys.index_select(0, group.blocks).view(num_rows, -1, num_kv_heads, head_dim).transpose(1, 2)
    v = values.index_select(0, group.blocks).view(num_rows, -1, num_kv_heads, head_dim).transpose(1, 2)
    mask = group.mask if num_groups == 1 else group.mask.repeat(1, 1, num_groups, 1)
    out = F.scaled_dot_product_attention(q.to(k.dtype), k, v, attn_mask=mask, scale=scaling)
    out = out.view(num_rows, num_kv_heads, num_groups, num_queries, head_dim).permute(0, 3, 1, 2, 4)
    return out.reshape(num_rows, num_queries, num_kv_heads * num_groups, head_dim).to(queries.dtype)


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
    layer = module.layer_idx
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    trimtab_batch.write(layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
    output = trimtab_batch.attend(layer, query[0].transpose(0, 1), scaling, sliding_window)
    return output[None], None


AttentionInterface.register(ATTENTION_NAME, paged_attention)
