"""vLLM's own CPU attention for the adapter LMs' blocks: reads them in place where PyTorch must gather them first.

Bound to three operators of vLLM 0.32.0's CPU extension, as its CPU attention backend calls them
(`vllm/v1/attention/backends/cpu_attn.py`). A block holds the keys of one head after the other and then its values,
`[blocks, K, 2 * BLOCK_SIZE, D]`, in an order inside a head that the operators choose.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, _get_attn_isa

from trimtab_adapters.attention import AttentionKernel, PagedBatch
from trimtab_adapters.kv_pool import BLOCK_SIZE, KvGeometry

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the operators want to know of a batch, in the types that they want it in."""

    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    scheduler_metadata: Tensor
    sliding_window: int


class CpuKernel(AttentionKernel):
    """Paged attention by vLLM's CPU operators."""

    @override
    def supports(self, geometry: KvGeometry, device: torch.device) -> bool:
        return (
            device.type == "cpu"
            and geometry.dtype in _DTYPES
            and geometry.head_dim in CPUAttentionBackend.get_supported_head_sizes()
            and hasattr(torch.ops._C, "cpu_attention_with_kv_cache")
        )

    @override
    def write(self, batch: PagedBatch, layer: int, keys: Tensor, values: Tensor) -> None:
        key_cache, value_cache = _caches(batch, layer)
        dtype = batch.pool.geometry.dtype
        ops.cpu_attn_reshape_and_cache(
            keys.to(dtype).contiguous(),
            values.to(dtype).contiguous(),
            key_cache,
            value_cache,
            batch.slots,
            _isa(batch.pool.geometry),
        )

    @override
    def plan(self, batch: PagedBatch, num_heads: int, sliding_window: int | None) -> _Plan:
        geometry = batch.pool.geometry
        starts = np.concatenate((batch.starts, [batch.starts[-1] + batch.num_new[-1]]))
        query_start_loc = batch.to_device(starts.astype(np.int32))
        seq_lens = batch.to_device(batch.lengths.astype(np.int32))
        window = -1 if sliding_window is None else sliding_window
        return _Plan(
            query_start_loc=query_start_loc,
            seq_lens=seq_lens,
            block_table=batch.to_device(batch.tables.astype(np.int32)),
            scheduler_metadata=ops.cpu_attn_get_scheduler_metadata(
                num_reqs=len(batch.lengths),
                num_heads=num_heads,
                num_kv_heads=geometry.num_kv_heads,
                head_dim=geometry.head_dim,
                seq_lens=seq_lens,
                dtype=geometry.dtype,
                query_start_loc=query_start_loc,
                causal=True,
                sliding_window_size=window,
                isa=_isa(geometry),
                enable_kv_split=True,
            ),
            sliding_window=window,
        )

    @override
    def attend(self, batch: PagedBatch, plan: Any, layer: int, queries: Tensor, scaling: float) -> Tensor:
        key_cache, value_cache = _caches(batch, layer)
        query = queries.to(batch.pool.geometry.dtype).contiguous()
        output = torch.empty_like(query)
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=output,
            query_start_loc=plan.query_start_loc,
            seq_lens=plan.seq_lens,
            scale=scaling,
            causal=True,
            alibi_slopes=None,
            sliding_window=plan.sliding_window,
            block_table=plan.block_table,
            softcap=0.0,
            scheduler_metadata=plan.scheduler_metadata,
            s_aux=None,
        )
        return output.to(queries.dtype)


def _isa(geometry: KvGeometry) -> str:
    isa: str = _get_attn_isa(geometry.dtype, BLOCK_SIZE, geometry.head_dim)
    return isa


def _caches(batch: PagedBatch, layer: int) -> tuple[Tensor, Tensor]:
    geometry = batch.pool.geometry
    blocks = batch.pool.layers[layer].view(-1, geometry.num_kv_heads, 2 * BLOCK_SIZE, geometry.head_dim)
    keys, values = blocks.chunk(2, dim=2)
    return keys, values
