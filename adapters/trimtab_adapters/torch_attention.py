"""Paged attention in plain PyTorch: gathers each row's blocks and calls the fused attention of PyTorch on them.

It runs on every device and is the reference for faster kernels. Its price is the gather: each step copies the keys and
values of all rows once per layer.

Letters: T new tokens of all rows, R rows, Q queries of a row, H query heads, K key/value heads, G = H / K, D head size,
L longest context.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from trimtab_adapters.attention import AttentionKernel, PagedBatch
from trimtab_adapters.kv_pool import BLOCK_SIZE, KvGeometry, KvPool

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


class TorchKernel(AttentionKernel):
    """A block holds, token by token, the keys of all heads and then their values: `[blocks, BLOCK_SIZE, 2, K, D]`."""

    @override
    def supports(self, geometry: KvGeometry, device: torch.device) -> bool:
        return True

    @override
    def write(self, batch: PagedBatch, layer: int, keys: Tensor, values: Tensor) -> None:
        tokens = _blocks(batch.pool, layer).flatten(0, 1)
        tokens[:, 0].index_copy_(0, batch.slots, keys.to(tokens.dtype))
        tokens[:, 1].index_copy_(0, batch.slots, values.to(tokens.dtype))

    @override
    def plan(self, batch: PagedBatch, num_heads: int, sliding_window: int | None) -> list[_RowGroup]:
        order = np.lexsort((batch.lengths, batch.num_new))
        groups: list[_RowGroup] = []
        start = 0
        while start < len(order):
            stop = start + 1
            while stop < len(order) and _fits(batch, order[start : stop + 1], num_heads):
                stop += 1
            # With only decoding rows their order is kept, so that the result needs no scatter.
            groups.append(_build_group(batch, np.sort(order[start:stop]), sliding_window))
            start = stop
        return groups

    @override
    def attend(self, batch: PagedBatch, plan: list[_RowGroup], layer: int, queries: Tensor, scaling: float) -> Tensor:
        blocks = _blocks(batch.pool, layer)
        if len(plan) == 1 and plan[0].query_index.shape[1] == 1:
            return _attend_group(plan[0], queries, blocks, scaling)[:, 0]
        output = torch.empty_like(queries)
        for group in plan:
            result = _attend_group(group, queries, blocks, scaling)
            index = group.query_index
            if group.is_query is None:
                output[index.flatten()] = result.flatten(0, 1)
            else:
                output[index[group.is_query]] = result[group.is_query]
        return output


def _blocks(pool: KvPool, layer: int) -> Tensor:
    geometry = pool.geometry
    return pool.layers[layer].view(-1, BLOCK_SIZE, 2, geometry.num_kv_heads, geometry.head_dim)


def _fits(batch: PagedBatch, rows: "np.ndarray[Any, Any]", num_heads: int) -> bool:
    """Whether rows may share a padded group: all decoding, or similar prefills whose scores fit the bound."""
    shortest, longest = batch.num_new[rows[0]], batch.num_new[rows[-1]]
    if longest == 1:
        return True
    if shortest == 1 or longest > 2 * shortest:
        return False
    return bool(len(rows) * num_heads * longest * batch.lengths[rows].max() <= _MAX_SCORES)


def _build_group(batch: PagedBatch, rows: "np.ndarray[Any, Any]", sliding_window: int | None) -> _RowGroup:
    new, lengths = batch.num_new[rows], batch.lengths[rows]
    num_queries = int(new.max())
    num_blocks = int(-(-lengths.max() // BLOCK_SIZE))
    offset = np.arange(num_queries)
    is_query = offset < new[:, None]
    query_index = batch.starts[rows][:, None] + np.where(is_query, offset, 0)
    query_position = (lengths - new)[:, None] + np.where(is_query, offset, 0)
    key_position = np.arange(num_blocks * BLOCK_SIZE)
    mask = key_position <= query_position[:, :, None]
    if sliding_window is not None:
        mask &= key_position > query_position[:, :, None] - sliding_window
    return _RowGroup(
        query_index=batch.to_device(query_index),
        blocks=batch.to_device(np.ascontiguousarray(batch.tables[rows, :num_blocks]).reshape(-1)),
        mask=batch.to_device(mask)[:, None],
        is_query=None if is_query.all() else batch.to_device(is_query),
    )


def _attend_group(group: _RowGroup, queries: Tensor, blocks: Tensor, scaling: float) -> Tensor:
    """Attention of one padded group, `[R, Q, H, D]`. Heads that share keys are folded into the query dimension."""
    num_rows, num_queries = group.query_index.shape
    num_kv_heads, head_dim = blocks.shape[-2:]
    num_groups = queries.shape[1] // num_kv_heads
    q = queries[group.query_index.flatten()].view(num_rows, num_queries, num_kv_heads, num_groups, head_dim)
    q = q.permute(0, 2, 3, 1, 4).reshape(num_rows, num_kv_heads, num_groups * num_queries, head_dim)
    context = blocks.index_select(0, group.blocks).view(num_rows, -1, 2, num_kv_heads, head_dim)
    k, v = context.permute(2, 0, 3, 1, 4).unbind(0)
    mask = group.mask if num_groups == 1 else group.mask.repeat(1, 1, num_groups, 1)
    out = F.scaled_dot_product_attention(q.to(k.dtype), k, v, attn_mask=mask, scale=scaling)
    out = out.view(num_rows, num_kv_heads, num_groups, num_queries, head_dim).permute(0, 3, 1, 2, 4)
    return out.reshape(num_rows, num_queries, num_kv_heads * num_groups, head_dim).to(queries.dtype)
