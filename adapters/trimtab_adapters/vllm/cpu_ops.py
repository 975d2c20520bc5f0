"""vLLM's own CPU operators for the adapter LMs' dense arithmetic: weights laid out for oneDNN, fused norms.

Bound to operators of vLLM 0.32.0's CPU extension, called as vLLM's layers call them
(`vllm/model_executor/layers/utils.py`, `layernorm.py`, `activation.py`, `rotary_embedding/base.py`).
"""

import torch
from torch import Tensor
from typing_extensions import override
from vllm import _custom_ops as ops

from trimtab_adapters.dense_ops import DenseOps, Linear


class CpuOps(DenseOps):
    """Dense arithmetic by vLLM's CPU operators."""

    copies_weights = True

    @override
    def supports(self, dtype: torch.dtype, device: torch.device) -> bool:
        return device.type == "cpu" and dtype == torch.bfloat16 and ops._supports_onednn

    @override
    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        handler = ops.create_onednn_mm(weight.t(), 32)
        return lambda x: ops.onednn_mm(handler, x, bias)

    @override
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        output = torch.empty_like(x)
        ops.rms_norm(output, x, weight, eps)
        return output

    @override
    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        ops.fused_add_rms_norm(x, residual, weight, eps)
        return x, residual

    @override
    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        output = gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))
        torch.ops._C.silu_and_mul(output, gate_up)
        return output

    @override
    def rotate(self, heads: Tensor, cos_sin: Tensor) -> Tensor:
        num_tokens, num_heads, head_dim = heads.shape
        flat = heads.reshape(num_tokens, num_heads * head_dim)
        positions = torch.arange(num_tokens)
        ops.rotary_embedding(positions, flat, None, head_dim, cos_sin, True)
        return flat.view(num_tokens, num_heads, head_dim)
