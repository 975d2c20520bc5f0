"""The dense arithmetic of a decoder layer, in plain PyTorch or by an engine's own operators.

Letters: T tokens, E hidden size, H heads, D head size, F width of the MLP.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

Linear = Callable[[Tensor], Tensor]


class DenseOps(Protocol):
    """What a decoder layer computes besides attention."""

    copies_weights: bool
    """Whether `linear` keeps a copy of its own instead of the weight."""

    def supports(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether these operators take this type on this device."""

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """`x -> x W^T + b` for `[T, in]` inputs; the weight may be laid out anew, and is not needed afterwards."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Normalise the last dimension."""

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """`residual + x`, normalised, and that sum itself. Both arguments may be overwritten."""

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """`[T, 2F]` -> `[T, F]`: SiLU of the first half times the second."""

    def rotate(self, heads: Tensor, cos_sin: Tensor) -> Tensor:
        """Rotary embedding of `[T, H, D]` by `[T, D]`: cosines of the D/2 angles, then their sines. In place or not."""


class TorchOps(DenseOps):
    """Plain PyTorch; the same rounding as transformers' modules."""

    copies_weights = False

    @override
    def supports(self, dtype: torch.dtype, device: torch.device) -> bool:
        return True

    @override
    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return lambda x: F.linear(x, weight, bias)

    @override
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    @override
    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = residual + x
        return self.rms_norm(total, weight, eps), total

    @override
    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    @override
    def rotate(self, heads: Tensor, cos_sin: Tensor) -> Tensor:
        cos, sin = cos_sin[:, None].chunk(2, dim=-1)
        first, second = heads.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
