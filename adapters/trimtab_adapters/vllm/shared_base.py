"""vLLM's loaded base model, run a second time in a step over blocks of ours: no second copy of its weights.

The base under another prompt is another sequence, which vLLM's scheduler knows nothing of. So its modules are called
directly, with each `Attention` layer's forward replaced for the duration of the call by one that reads and writes our
block pool. Everything else of the model, quantised or not, runs as it is.

Bound to vLLM 0.32.0: `static_forward_context`, `Attention.forward(query, key, value, ...)`, the attributes of its
`impl`, `compute_logits`, and `set_forward_context(skip_compiled=True)`. That it gives the base's own numbers is checked
when an engine starts (`endpoints`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention

from trimtab_adapters.adapter_lm import Backend, PackedLM
from trimtab_adapters.attention import PagedBatch
from trimtab_adapters.contract.errors import AdapterError
from trimtab_adapters.kv_pool import KvGeometry, KvPool, SequenceCache
from trimtab_adapters.torch_attention import TorchKernel
from trimtab_adapters.vllm.engine_config import backend_for


class SharedBaseLM(PackedLM):
    """The base model behind the interface of an adapter LM. Build it with `share_base`."""

    def __init__(
        self, model: Any, layers: Sequence[Attention], config: VllmConfig, device: torch.device, backend: Backend
    ) -> None:
        first = layers[0]
        self._model: Any = model
        self._layers = list(layers)
        self._vllm_config = config
        self.config = config.model_config.hf_text_config
        self.device = device
        self.num_logits = config.model_config.get_vocab_size()
        self.max_length = config.model_config.max_model_len
        self.geometry = KvGeometry(
            num_layers=len(layers),
            num_kv_heads=first.num_kv_heads,
            head_dim=first.head_size,
            dtype=config.model_config.dtype,
        )
        is_supported = backend.attention.supports(self.geometry, device)
        self.kernel = backend.attention if is_supported else TorchKernel()
        self.weight_bytes = 0

    @property
    @override
    def trunk(self) -> PackedLM:
        return self

    @override
    def batch(self, pool: KvPool, sequences: Sequence[SequenceCache], num_new: Sequence[int]) -> PagedBatch:
        return PagedBatch(pool, sequences, num_new, self.kernel)

    @override
    @torch.inference_mode()
    def forward(self, batch: PagedBatch, rows: Sequence[int] | None = None) -> Tensor:
        wanted = batch.last_index
        if rows is not None:
            wanted = wanted[torch.as_tensor(rows, dtype=torch.long, device=self.device)]
        with self._over_our_blocks(batch), set_forward_context(None, self._vllm_config, skip_compiled=True):
            hidden: Tensor = self._model(
                input_ids=batch.token_ids, positions=batch.positions, intermediate_tensors=None, inputs_embeds=None
            )
            logits: Tensor = self._model.compute_logits(hidden[wanted])
        return logits

    @contextmanager
    def _over_our_blocks(self, batch: PagedBatch) -> Iterator[None]:
        try:
            for number, layer in enumerate(self._layers):
                layer.forward = partial(_attend, layer, number, batch)  # hides the class's own
            yield
        finally:
            for layer in self._layers:
                layer.__dict__.pop("forward", None)

    @override
    def free(self) -> None:
        """Nothing: the weights are vLLM's."""


def _attend(
    layer: Attention, number: int, batch: PagedBatch, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> Tensor:
    """`[T, H * D]` queries and `[T, K * D]` keys and values to `[T, H * D]`, over the blocks of a batch."""
    attended = batch.attend(
        number,
        query.view(-1, layer.num_heads, layer.head_size),
        key.view(-1, layer.num_kv_heads, layer.head_size),
        value.view(-1, layer.num_kv_heads, layer.head_size),
        scaling=layer.impl.scale,
        sliding_window=layer.sliding_window,
    )
    return attended.reshape(-1, layer.num_heads * layer.head_size)


def share_base(model: Any, config: VllmConfig, device: torch.device) -> SharedBaseLM:
    """The base model of a worker as an expert.

    Raises:
        AdapterError: Its architecture, or how it is spread over devices, does not allow it.
    """
    parallel = config.parallel_config
    if parallel.tensor_parallel_size > 1 or parallel.pipeline_parallel_size > 1:
        raise AdapterError("a base model spread over several devices cannot be its own expert yet")
    if config.model_config.uses_mrope or config.lora_config is not None:
        raise AdapterError("a base model with multimodal positions or vLLM's own LoRA cannot be its own expert")
    layers = list(config.compilation_config.static_forward_context.values())
    if not layers or not all(_is_plain(layer) for layer in layers):
        raise AdapterError("a base model with other than plain causal attention layers cannot be its own expert")
    shapes = {(layer.num_kv_heads, layer.head_size, layer.head_size_v) for layer in layers}
    if len(shapes) > 1 or layers[0].head_size_v != layers[0].head_size:
        raise AdapterError("a base model whose layers have different key and value shapes cannot be its own expert")
    return SharedBaseLM(model, layers, config, device, backend_for(device))


def _is_plain(layer: Any) -> bool:
    return (
        type(layer) is Attention
        and layer.attn_type == "decoder"
        and layer.kv_sharing_target_layer_name is None
        and layer.query_quant is None
        and not layer.has_sink
        and getattr(layer.impl, "alibi_slopes", None) is None
        and not getattr(layer.impl, "logits_soft_cap", 0)
    )
