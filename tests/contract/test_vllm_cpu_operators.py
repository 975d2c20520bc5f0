"""vLLM's CPU operators as the adapter LMs use them, against plain PyTorch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trimtab_adapters.attention import AttentionKernel, PagedBatch
from trimtab_adapters.dense_ops import TorchOps
from trimtab_adapters.kv_pool import BLOCK_SIZE, KvBudget, KvGeometry, KvPool, SequenceCache
from trimtab_adapters.torch_attention import TorchKernel

pytest.importorskip("vllm.v1.attention.backends.cpu_attn", reason="vLLM's CPU build is not installed")

from trimtab_adapters.vllm.cpu_attention import CpuKernel
from trimtab_adapters.vllm.cpu_ops import CpuOps

CPU = torch.device("cpu")
# Contexts that end inside, at and behind the end of a block; the second number is how many tokens are new.
ROWS = [(1, 1), (BLOCK_SIZE, 1), (BLOCK_SIZE + 1, 1), (40, 7), (100, 100), (33, 1), (64, 20)]


def attend_in_two_passes(
    kernel: AttentionKernel, geometry: KvGeometry, num_heads: int, window: int | None
) -> list[Tensor]:
    """Rows are filled up to their new tokens in one pass, which is the second pass: both outputs."""
    generator = torch.Generator().manual_seed(1)

    def draw(num_tokens: int, heads: int) -> Tensor:
        shape = (num_tokens, heads, geometry.head_dim)
        return torch.randn(shape, generator=generator).to(geometry.dtype)

    pool = KvPool(geometry, KvBudget(64 * geometry.block_bytes), CPU, min_blocks=64)
    sequences = [SequenceCache(root=bytes([number])) for number in range(len(ROWS))]
    outputs = []
    for counts in ([length - new for length, new in ROWS], [new for _, new in ROWS]):
        chosen = [(sequence, count) for sequence, count in zip(sequences, counts, strict=True) if count]
        for sequence, count in chosen:
            pool.extend(sequence, list(range(count)))
        batch = PagedBatch(pool, [sequence for sequence, _ in chosen], [count for _, count in chosen], kernel)
        for layer in range(geometry.num_layers):
            tensors = [draw(sum(counts), heads) for heads in (num_heads, geometry.num_kv_heads, geometry.num_kv_heads)]
            outputs.append(batch.attend(layer, *tensors, scaling=geometry.head_dim**-0.5, sliding_window=window))
    return outputs


@pytest.mark.parametrize("window", [None, 10])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(2, 2, 32), (8, 2, 64), (4, 1, 128)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_cpu_kernel_attends_as_pytorch_does(
    dtype: torch.dtype, tolerance: float, num_heads: int, num_kv_heads: int, head_dim: int, window: int | None
) -> None:
    geometry = KvGeometry(num_layers=2, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype)
    assert CpuKernel().supports(geometry, CPU)
    ours = attend_in_two_passes(CpuKernel(), geometry, num_heads, window)
    plain = attend_in_two_passes(TorchKernel(), geometry, num_heads, window)
    for got, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=0.0)


def test_a_head_size_that_the_operators_do_not_have_is_left_to_pytorch() -> None:
    assert not CpuKernel().supports(KvGeometry(1, 1, 48, torch.float32), CPU)
    assert not CpuOps().supports(torch.float32, CPU)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


DENSE: dict[str, Callable[[TorchOps | CpuOps], Tensor]] = {
    "linear": lambda ops: ops.linear(drawn(96, 64) / 8, drawn(96))(drawn(5, 64)),
    "linear without bias": lambda ops: ops.linear(drawn(96, 64) / 8, None)(drawn(1, 64)),
    "linear of no rows": lambda ops: ops.linear(drawn(96, 64), None)(drawn(0, 64)),
    "rms_norm": lambda ops: ops.rms_norm(drawn(5, 64), drawn(64), 1e-6),
    "rms_norm of heads": lambda ops: ops.rms_norm(drawn(5, 3, 32), drawn(32), 1e-6),
    "add_rms_norm": lambda ops: torch.cat(ops.add_rms_norm(drawn(5, 64), drawn(5, 64) + 1, drawn(64), 1e-6)),
    "silu_and_mul": lambda ops: ops.silu_and_mul(drawn(5, 128)),
    "rotate": lambda ops: ops.rotate(drawn(5, 3, 32), drawn(5, 32)),
    "rotate a part": lambda ops: ops.rotate(drawn(5, 7, 32)[:, 2:5], drawn(5, 32)),
}


@pytest.mark.parametrize("name", DENSE)
def test_the_dense_operators_compute_what_pytorch_does(name: str) -> None:
    if not CpuOps().supports(torch.bfloat16, CPU):
        pytest.skip("this build of vLLM has no oneDNN")
    got, expected = DENSE[name](CpuOps()), DENSE[name](TorchOps())
    torch.testing.assert_close(got.float(), expected.float(), atol=5e-2, rtol=2e-2)
