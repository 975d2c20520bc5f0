"""An adapter LM that is a LoRA on another one: it has its own small matrices and runs on the other's weights."""

from collections.abc import Callable, Generator, Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from trimtab_adapters.adapter_lm import AdapterLM, PackedLM, largest_error, self_test_tokens, self_test_tolerance
from trimtab_adapters.attention import PagedBatch
from trimtab_adapters.contract.errors import AdapterError, WeightsError
from trimtab_adapters.contract.lora import LoraConfig
from trimtab_adapters.kv_pool import KvBudget, KvPool, SequenceCache
from trimtab_adapters.lora_layers import DenseUpdates, LoraLayers, LoraPass, LoraStacks, place_updates
from trimtab_adapters.lora_weights import LowRank, check_modules


class LoraLM(PackedLM):
    """A LoRA on a trunk whose layers are ours. Build it with `check_lora`.

    Args:
        trunk: The LM.
        layers: The LoRA's matrices.
        stacks: The trunk's, shared by all its LoRAs.
        release: Called once when the LoRA no longer needs the trunk.
    """

    def __init__(
        self, trunk: AdapterLM, layers: LoraLayers, stacks: LoraStacks, release: Callable[[], None] = lambda: None
    ) -> None:
        self._trunk = trunk
        self._release: Callable[[], None] | None = release
        self.layers = layers
        self.stacks = stacks
        self.device, self.config, self.geometry = trunk.device, trunk.config, trunk.geometry
        self.num_logits, self.max_length = trunk.num_logits, trunk.max_length
        self.weight_bytes = layers.weight_bytes

    @property
    @override
    def trunk(self) -> AdapterLM:
        return self._trunk

    @override
    def batch(self, pool: KvPool, sequences: Sequence[SequenceCache], num_new: Sequence[int]) -> PagedBatch:
        return self._trunk.batch(pool, sequences, num_new)

    @override
    def forward(self, batch: PagedBatch, rows: Sequence[int] | None = None) -> Tensor:
        return forward_together([self] * len(batch.num_new), batch, rows)

    @override
    def free(self) -> None:
        release, self._release = self._release, None
        if release is None:
            return
        self.stacks.discard(self.layers)
        self.layers.parts.clear()
        release()


def forward_together(loras: Sequence[LoraLM], batch: PagedBatch, rows: Sequence[int] | None = None) -> Tensor:
    """`AdapterLM.forward` with a LoRA for each row of the batch; all have the same trunk."""
    first = loras[0]
    with torch.inference_mode():
        updates = LoraPass(first.stacks, [lora.layers for lora in loras], batch.num_new.tolist(), first.device)
        return first.trunk.forward(batch, rows, updates)


def check_lora(
    config: LoraConfig,
    updates: Mapping[str, LowRank],
    trunk: AdapterLM,
    stacks: LoraStacks,
    release: Callable[[], None] = lambda: None,
) -> Generator[None, None, LoraLM]:
    """Place a LoRA on its trunk and check, in small steps, that it gives there what its full matrices give.

    The trunk's layers were compared with transformers' when it was loaded. So what is compared here is the LoRA as it
    is applied to packed rows, rounded, stacked and masked, with the same layers plus `scaling * B A` as one dense
    float32 matrix each, which is what merging it into the weights would compute.

    Args:
        config: Of the LoRA.
        updates: Its matrices.
        trunk: Loaded, its layers ours.
        stacks: The trunk's.
        release: For `LoraLM`; not called when this fails.

    Raises:
        AdapterError: It is refused.
    """
    lean = trunk.lean
    if lean is None:
        raise AdapterError("a LoRA can share a LM only where our own layers run it, and here they gave other logits")
    check_modules(config, updates, lean.linears)
    layers = place_updates(updates, lean.places, trunk.geometry.dtype, trunk.device)
    yield
    expected = yield from _expected(trunk, DenseUpdates(updates, lean.places, trunk.device))
    if not bool(torch.isfinite(expected).all()):
        raise WeightsError(f"with this LoRA the LM gives NaN or infinite logits in {trunk.geometry.dtype}")
    # Beside its own opposite, which would take away all that it does if it leaked into its rows.
    beside = LoraStacks(trunk.dense, trunk.device)
    beside.stack_for([layers.opposite()])
    error = yield from largest_error(LoraLM(trunk, layers, beside), expected)
    if not error <= self_test_tolerance(trunk.geometry.dtype):
        raise AdapterError(
            f"the LoRA gives other logits beside its trunk's weights than merged into them (largest difference "
            f"{error:.3g} nats)"
        )
    return LoraLM(trunk, layers, stacks, release)


def _expected(trunk: AdapterLM, updates: DenseUpdates) -> Generator[None, None, Tensor]:
    """Log-probabilities after half of the test's tokens, all but one, and all, `[3, A]`."""
    tokens = self_test_tokens(trunk).tolist()
    pool = KvPool(trunk.geometry, KvBudget(8 * trunk.geometry.block_bytes), trunk.device, min_blocks=8)
    parts = []
    for count in (len(tokens) // 2, len(tokens) - 1, len(tokens)):
        sequence = SequenceCache(root=b"merged" + bytes([count]))
        pool.extend(sequence, tokens[:count])
        parts.append(trunk.forward(trunk.batch(pool, [sequence], [count]), None, updates))
        pool.discard(sequence)
        yield
    return torch.log_softmax(torch.cat(parts).float(), dim=-1)
