"""The forward pass of the Llama family without transformers' modules: fewer, larger operations for the same numbers.

transformers' modules cost some forty small operations a layer, which for a small adapter LM is more time than its
matrix products. Here query, key and value are one product, so are the two inputs of the MLP, and everything between
products is one call each. Other families run through transformers' own modules; whichever it is, an adapter LM is
compared with its own implementation when it is loaded.

A pass may name `LinearUpdates`, LoRAs that change what the products give, each token's by its own row.

Letters: T new tokens of all rows, E hidden size, H query heads, K key/value heads, D head size, A width of the logits.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab_adapters.attention import PagedBatch
from trimtab_adapters.dense_ops import DenseOps, Linear
from trimtab_adapters.lora_layers import LinearUpdates, Site

FAMILIES = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})
"""Classes of transformers whose layers are the ones written here."""


SITES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "output": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""The products of a layer, and transformers' modules that each is made of, in the order of its output's columns."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """Weights of one layer. `head_norms` are Qwen3's norms of each query and key head."""

    input_norm: Tensor
    qkv: Linear
    head_norms: tuple[Tensor, Tensor] | None
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear
    sliding_window: int | None


class LeanDecoder:
    """A decoder of one of `FAMILIES`, built from a transformers model whose matrices it takes over; see `build`.

    Args:
        model: The transformers model. Its large weights may be freed afterwards: what is needed is kept here.
        ops: The arithmetic.
    """

    def __init__(self, model: Any, ops: DenseOps) -> None:
        config, decoder = model.config, model.model
        self._ops = ops
        self._num_heads: int = config.num_attention_heads
        self._num_kv_heads: int = config.num_key_value_heads
        self._head_dim: int = decoder.layers[0].self_attn.head_dim
        self._scaling: float = decoder.layers[0].self_attn.scaling
        self._eps: float = config.rms_norm_eps
        self._rotary = decoder.rotary_emb
        self._embedding: Tensor = decoder.embed_tokens.weight.detach()
        self._final_norm: Tensor = decoder.norm.weight.detach()
        self._head = _linear(ops, model.lm_head)
        self.linears: dict[str, tuple[int, int]] = {}
        """Widths (out, in) of the linear layers that a LoRA may change, by their names in transformers' model."""
        self.places: dict[str, tuple[Site, int, int]] = {}
        """For each of them its product and its columns there, from and to."""
        for number, layer in enumerate(decoder.layers):
            for site, modules in SITES.items():
                begin = 0
                for module in modules:
                    name = f"model.layers.{number}.{module}"
                    width, width_in = layer.get_submodule(module).weight.shape
                    self.linears[name] = (width, width_in)
                    self.places[name] = ((number, site), begin, begin + width)
                    begin += width
        self._layers: list[_Layer] = []
        self._sources = (decoder.layers, config)

    def build(self) -> Iterator[None]:
        """Take over the layers, one at each step: laying matrices out anew takes time that others may want between."""
        layers, config = self._sources
        for layer in layers:
            self._layers.append(_layer(self._ops, layer, config))
            yield
        self._sources = ((), None)

    @staticmethod
    def supports(model: Any) -> bool:
        """Whether the model is one of `FAMILIES`, with nothing unusual in its configuration."""
        config = model.config
        return (
            type(model).__name__ in FAMILIES
            and config.hidden_act == "silu"
            and getattr(config, "quantization_config", None) is None
            and all(type(m).__name__ == "Linear" for m in (model.lm_head, model.model.layers[0].self_attn.q_proj))
        )

    def forward(self, batch: PagedBatch, wanted: Tensor, updates: LinearUpdates | None = None) -> Tensor:
        """Next-token logits `[len(wanted), A]` at these places of the packed tokens."""
        ops = self._ops
        residual = self._embedding[batch.token_ids]
        cos, sin = self._rotary(residual[None], batch.positions[None])
        half = self._head_dim // 2
        cos_sin = torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1)
        hidden = ops.rms_norm(residual, self._layers[0].input_norm, self._eps)
        for number, layer in enumerate(self._layers):
            attended = self._attend(layer, number, batch, hidden, cos_sin, updates)
            projected = _product(layer.output, attended, updates, number, "output")
            hidden, residual = ops.add_rms_norm(projected, residual, layer.mlp_norm, self._eps)
            gated = ops.silu_and_mul(_product(layer.gate_up, hidden, updates, number, "gate_up"))
            hidden = _product(layer.down, gated, updates, number, "down")
            if number + 1 < len(self._layers):
                norm = self._layers[number + 1].input_norm
                hidden, residual = ops.add_rms_norm(hidden, residual, norm, self._eps)
        last = ops.add_rms_norm(hidden[wanted], residual[wanted], self._final_norm, self._eps)[0]
        return self._head(last)

    def _attend(
        self,
        layer: _Layer,
        number: int,
        batch: PagedBatch,
        hidden: Tensor,
        cos_sin: Tensor,
        updates: LinearUpdates | None,
    ) -> Tensor:
        qkv = _product(layer.qkv, hidden, updates, number, "qkv")
        heads = qkv.view(-1, self._num_heads + 2 * self._num_kv_heads, self._head_dim)
        sizes = [self._num_heads, self._num_kv_heads, self._num_kv_heads]
        query, key, value = torch.split(heads, sizes, dim=1)
        if layer.head_norms is not None:
            query = self._ops.rms_norm(query.contiguous(), layer.head_norms[0], self._eps)
            key = self._ops.rms_norm(key.contiguous(), layer.head_norms[1], self._eps)
        query, key = self._ops.rotate(query, cos_sin), self._ops.rotate(key, cos_sin)
        window = layer.sliding_window
        attended = batch.attend(number, query, key, value, scaling=self._scaling, sliding_window=window)
        return attended.reshape(len(hidden), -1)

    def free(self) -> None:
        """Let go of all weights."""
        self._layers.clear()
        empty = self._embedding.new_empty(0)
        self._embedding, self._final_norm, self._head = empty, empty, lambda x: x


def _product(linear: Linear, x: Tensor, updates: LinearUpdates | None, layer: int, site: str) -> Tensor:
    y = linear(x)
    if updates is not None:
        updates.add(layer, site, x, y)
    return y


def _layer(ops: DenseOps, layer: Any, config: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    norms = (attention.q_norm.weight, attention.k_norm.weight) if hasattr(attention, "q_norm") else None
    if hasattr(attention, "sliding_window"):
        window = attention.sliding_window
    else:  # Mistral has one for all layers
        window = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
    return _Layer(
        input_norm=layer.input_layernorm.weight,
        qkv=_linear(ops, *(layer.get_submodule(name) for name in SITES["qkv"])),
        head_norms=norms,
        output=_linear(ops, attention.o_proj),
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=_linear(ops, *(layer.get_submodule(name) for name in SITES["gate_up"])),
        down=_linear(ops, mlp.down_proj),
        sliding_window=window,
    )


def _linear(ops: DenseOps, *modules: Any) -> Linear:
    """One product for several linear modules with the same input."""
    weights = [module.weight.detach() for module in modules]
    biases = [module.bias.detach() for module in modules if module.bias is not None]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    return ops.linear(weight, torch.cat(biases) if biases else None)
