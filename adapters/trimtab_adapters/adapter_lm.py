"""An adapter LM: any Hugging Face causal LM directory, loaded, verified and ready for packed forward passes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from trimtab_adapters.attention import ATTENTION_NAME, AttentionKernel, PagedBatch
from trimtab_adapters.contract.errors import AdapterError, WeightsError
from trimtab_adapters.kv_pool import KvBudget, KvGeometry, KvPool, SequenceCache
from trimtab_adapters.torch_attention import TorchKernel

_SELF_TEST_TOKENS = 24
_SELF_TEST_TOLERANCE = {torch.float32: 2e-3, torch.float16: 5e-2, torch.bfloat16: 3e-1}
"""Largest difference of log-probabilities between our attention and the model's own, by type. A wrong mask, position or
head layout is off by whole nats; rounding stays far below."""


class AdapterLM:
    """A causal LM that computes next-token logits of many rows in one packed pass over the block pool.

    Build it with `load_adapter_lm`. Not safe for concurrent use.
    """

    def __init__(self, model: Any, device: torch.device, kernels: Sequence[AttentionKernel] = ()) -> None:
        self.model = model
        self.device = device
        config = model.config.get_text_config()
        num_heads = config.num_attention_heads
        self.num_logits = int(model.get_output_embeddings().weight.shape[0])
        """A, the width of the logits."""
        self.max_length = int(getattr(config, "max_position_embeddings", 0) or 1 << 30)
        """Most tokens (prefix included) that its positions allow."""
        self.weight_bytes = sum(p.numel() * p.element_size() for p in _distinct_parameters(model))
        self.geometry = KvGeometry(
            num_layers=int(config.num_hidden_layers),
            num_kv_heads=int(getattr(config, "num_key_value_heads", None) or num_heads),
            head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // num_heads),
            dtype=model.dtype,
        )
        self.kernel = next((k for k in kernels if k.supports(self.geometry, device)), None) or TorchKernel()
        """Of versions that share a pool all have the same: it depends on geometry and device alone."""

    def batch(self, pool: KvPool, sequences: Sequence[SequenceCache], num_new: Sequence[int]) -> PagedBatch:
        """The packed pass over rows that were extended by so many new tokens each."""
        return PagedBatch(pool, sequences, num_new, self.kernel)

    @torch.inference_mode()
    def forward(self, batch: PagedBatch, rows: Sequence[int] | None = None) -> Tensor:
        """Run the packed new tokens of all rows; returns next-token logits of the named rows, `[len(rows), A]`.

        The batch's sequences must already be extended; their keys and values are written into its pool.
        """
        wanted = batch.last_index
        if rows is not None:
            wanted = wanted[torch.as_tensor(rows, dtype=torch.long, device=self.device)]
        output = self.model(
            input_ids=batch.token_ids[None],
            position_ids=batch.positions[None],
            use_cache=False,
            logits_to_keep=wanted,
            trimtab_batch=batch,
        )
        logits: Tensor = output.logits[0]
        return logits

    def free(self) -> None:
        """Give the weights' memory back now, whoever still refers to the model's objects."""
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            tensor.data = tensor.data.new_empty(0)


def _distinct_parameters(model: Any) -> list[Tensor]:
    return list({p.data_ptr(): p for p in model.parameters()}.values())


def load_adapter_lm(
    directory: Path,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    kernels: Sequence[AttentionKernel] = (),
) -> AdapterLM:
    """Load an adapter LM from a directory and check that it works here before anybody depends on it.

    Args:
        directory: `config.json` and safetensors weights.
        device: Where it will run.
        dtype: Type of weights and cache; the directory's own when None.
        kernels: Attention kernels to choose from; the first that supports the model wins, else `TorchKernel`.

    Raises:
        AdapterError: Not a causal LM that transformers knows, or an attention that is not supported.
        WeightsError: Missing, misshapen, NaN or infinite weights.
    """
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        model, report = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=dtype or "auto",
            attn_implementation="sdpa",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, json.JSONDecodeError) as exc:
        raise AdapterError(f"{directory} cannot be loaded as a causal LM: {exc}") from exc
    _check_weights(model, report)
    model = model.to(device).eval().requires_grad_(False)
    adapter = AdapterLM(model, device, kernels)
    _self_test(adapter)
    return adapter


def _check_weights(model: Any, report: dict[str, Any]) -> None:
    missing = sorted(str(name) for name in report.get("missing_keys", ()))
    mismatched = sorted(str(name) for name in report.get("mismatched_keys", ()))
    if missing or mismatched:
        raise WeightsError(f"weights do not fit config.json: missing {missing[:3]}, wrong shape {mismatched[:3]}")
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise WeightsError(f"weight {name} holds NaN or infinite values")


@torch.inference_mode()
def _self_test(adapter: AdapterLM) -> None:
    """Compare our packed attention, in two chunks beside a second row, with the model's own forward pass."""
    model = adapter.model
    length = min(_SELF_TEST_TOKENS, adapter.max_length)
    ids = torch.arange(length) * 7919 % adapter.num_logits
    try:
        expected = torch.log_softmax(model(input_ids=ids[None].to(adapter.device)).logits[0].float(), dim=-1)
        model.set_attn_implementation(ATTENTION_NAME)
        pool = KvPool(adapter.geometry, KvBudget(16 * adapter.geometry.block_bytes), adapter.device, min_blocks=16)
        whole, halves = SequenceCache(root=b"whole"), SequenceCache(root=b"halves")
        tokens, middle = ids.tolist(), length // 2
        pool.extend(whole, tokens)
        pool.extend(halves, tokens[:middle])
        first = adapter.forward(adapter.batch(pool, [whole, halves], [length, middle]))
        pool.extend(halves, tokens[middle:])
        second = adapter.forward(adapter.batch(pool, [halves], [length - middle]))
    except (ValueError, RuntimeError, TypeError, AttributeError, IndexError, KeyError) as exc:
        raise AdapterError(f"a {model.config.model_type} model cannot be run as an adapter LM: {exc}") from exc
    got = torch.log_softmax(torch.cat((first, second)).float(), dim=-1)
    want = expected[[length - 1, middle - 1, length - 1]]
    error = float((got - want).abs().max())
    if not error <= _SELF_TEST_TOLERANCE.get(adapter.geometry.dtype, 0.3):
        raise AdapterError(
            f"a {model.config.model_type} model gives other logits under paged attention than on its own "
            f"(largest difference {error:.3g} nats); its attention is not supported"
        )
