"""An adapter LM: any Hugging Face causal LM directory, loaded, verified and ready for packed forward passes."""

import json
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from typing_extensions import override

from trimtab_adapters.attention import ATTENTION_NAME, AttentionKernel, PagedBatch
from trimtab_adapters.contract.errors import AdapterError, WeightsError
from trimtab_adapters.dense_ops import DenseOps, TorchOps
from trimtab_adapters.kv_pool import KvBudget, KvGeometry, KvPool, SequenceCache
from trimtab_adapters.lean_decoder import LeanDecoder
from trimtab_adapters.lora_layers import LinearUpdates
from trimtab_adapters.torch_attention import TorchKernel

logger = logging.getLogger(__name__)

_SELF_TEST_TOKENS = 24
_SELF_TEST_TOLERANCE = {torch.float32: 2e-3, torch.float16: 5e-2, torch.bfloat16: 3e-1}
"""Largest difference of log-probabilities between our attention and the model's own, by type. A wrong mask, position or
head layout is off by whole nats; rounding stays far below."""


@dataclass(frozen=True, slots=True)
class Backend:
    """What an engine offers beside plain PyTorch; each part is used where it supports the model."""

    attention: AttentionKernel = field(default_factory=TorchKernel)
    dense: DenseOps = field(default_factory=TorchOps)


class PackedLM(Protocol):
    """What runs packed rows: a LM, or a LoRA on one."""

    device: torch.device
    config: Any
    """transformers' configuration of the LM."""
    geometry: KvGeometry
    num_logits: int
    """A, the width of the logits."""
    max_length: int
    """Most tokens (prefix included) that its positions allow."""
    weight_bytes: int
    """Memory of its own weights; of a LoRA without the LM that it shares."""

    @property
    def trunk(self) -> "PackedLM":
        """The LM that runs. Versions with the same one run in one pass."""

    def batch(self, pool: KvPool, sequences: Sequence[SequenceCache], num_new: Sequence[int]) -> PagedBatch:
        """The packed pass over rows that were extended by so many new tokens each."""

    def forward(self, batch: PagedBatch, rows: Sequence[int] | None = None) -> Tensor:
        """Run the packed new tokens of all rows; returns next-token logits of the named rows, `[len(rows), A]`."""

    def free(self) -> None:
        """Give the weights' memory back now, whoever still refers to the object."""


class AdapterLM(PackedLM):
    """A causal LM that computes next-token logits of many rows in one packed pass over the block pool.

    Build it with `load_adapter_lm`. Not safe for concurrent use.
    """

    def __init__(self, model: Any, device: torch.device, backend: Backend | None = None) -> None:
        backend = backend or Backend()
        self._model: Any = model
        self._lean: LeanDecoder | None = None
        self.device = device
        self.config = config = model.config.get_text_config()
        num_heads = config.num_attention_heads
        self.num_logits = int(model.get_output_embeddings().weight.shape[0])
        """A, the width of the logits."""
        self.max_length = int(getattr(config, "max_position_embeddings", 0) or 1 << 30)
        """Most tokens (prefix included) that its positions allow."""
        self.geometry = KvGeometry(
            num_layers=int(config.num_hidden_layers),
            num_kv_heads=int(getattr(config, "num_key_value_heads", None) or num_heads),
            head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // num_heads),
            dtype=model.dtype,
        )
        is_supported = backend.attention.supports(self.geometry, device)
        self.kernel = backend.attention if is_supported else TorchKernel()
        """Of versions that share a pool all have the same: it depends on geometry and device alone."""
        self.dense = backend.dense if backend.dense.supports(model.dtype, device) else TorchOps()
        weights = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
        self.weight_bytes = sum(weights.values())
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        if LeanDecoder.supports(model) and self.dense.copies_weights and embedding is head:
            self.weight_bytes += weights[embedding.data_ptr()]

    @property
    @override
    def trunk(self) -> "AdapterLM":
        """The LM itself: what versions with the same one run in one pass."""
        return self

    @property
    def lean(self) -> LeanDecoder | None:
        """Our own layers, None where transformers' modules run."""
        return self._lean

    @override
    def batch(self, pool: KvPool, sequences: Sequence[SequenceCache], num_new: Sequence[int]) -> PagedBatch:
        return PagedBatch(pool, sequences, num_new, self.kernel)

    @torch.inference_mode()
    @override
    def forward(
        self,
        batch: PagedBatch,
        rows: Sequence[int] | None = None,
        updates: LinearUpdates | None = None,
    ) -> Tensor:
        """Run the packed new tokens of all rows; returns next-token logits of the named rows, `[len(rows), A]`.

        The batch's sequences must already be extended; their keys and values are written into its pool.

        Args:
            batch: The packed rows.
            rows: Places of the rows whose logits are wanted; None means all.
            updates: The LoRAs of this pass. Only where `lean` is what runs.
        """
        wanted = batch.last_index
        if rows is not None:
            wanted = wanted[torch.as_tensor(rows, dtype=torch.long, device=self.device)]
        if self._lean is not None:
            return self._lean.forward(batch, wanted, updates)
        output = self._model(
            input_ids=batch.token_ids[None],
            position_ids=batch.positions[None],
            use_cache=False,
            logits_to_keep=wanted,
            trimtab_batch=batch,
        )
        logits: Tensor = output.logits[0]
        return logits

    @override
    def free(self) -> None:
        if self._lean is not None:
            self._lean.free()
        if self._model is not None:
            for tensor in (*self._model.parameters(), *self._model.buffers()):
                tensor.data = tensor.data.new_empty(0)

    def use_lean(self) -> Iterator[None]:
        """Run the layers by our own code, from the end of this iterator on."""
        lean = LeanDecoder(self._model, self.dense)
        yield
        yield from lean.build()
        self._lean = lean

    def use_modules(self) -> None:
        """Run transformers' modules with our attention from now on."""
        self._lean = None
        self._model.set_attn_implementation(ATTENTION_NAME)

    def drop_modules(self) -> None:
        """Let go of transformers' modules when they are not what runs; their weights may have been copied."""
        if self._lean is not None:
            self._model = None


class UncheckedLM(Protocol):
    """Weights that were read, and that have not run on the engine's operators yet."""

    @property
    def shape(self) -> PackedLM:
        """Tells widths, lengths and geometry. Of no other use before the check is over."""

    def check(self) -> Generator[None, None, PackedLM]:
        """Prepare the weights for the engine's operators and compare what they give with the truth, in small steps.

        Every step must run on the thread that decodes, between two decoding steps: vLLM's CPU operators share scratch
        memory, so that two threads in them at once corrupt each other's numbers or end the process.

        Returns:
            What can be used.

        Raises:
            AdapterError: The results are wrong here.
        """

    def free(self) -> None:
        """Give the memory back when the check is not wanted, or failed."""


@dataclass(frozen=True, slots=True)
class UncheckedAdapterLM(UncheckedLM):
    """An adapter LM that was read, and what its own implementation says.

    Attributes:
        adapter: It.
        model: The transformers model.
        expected: `[3, A]`, see `_expected`.
    """

    adapter: AdapterLM
    model: Any
    expected: Tensor

    @property
    @override
    def shape(self) -> AdapterLM:
        return self.adapter

    @override
    def check(self) -> Generator[None, None, AdapterLM]:
        yield from _choose_implementation(self.adapter, self.model, self.expected)
        return self.adapter

    @override
    def free(self) -> None:
        self.adapter.free()


def load_adapter_lm(
    directory: Path,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    backend: Backend | None = None,
    change: Callable[[Any], None] | None = None,
) -> AdapterLM:
    """Load an adapter LM from a directory and check it, both at once. Arguments and errors as of `read_adapter_lm`."""
    unchecked = read_adapter_lm(directory, device, dtype=dtype, backend=backend, change=change)
    for _ in unchecked.check():
        pass
    return unchecked.adapter


def read_adapter_lm(
    directory: Path,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    backend: Backend | None = None,
    change: Callable[[Any], None] | None = None,
) -> UncheckedAdapterLM:
    """Read an adapter LM from a directory. May run on any thread: only PyTorch's own operators are used.

    Args:
        directory: `config.json` and safetensors weights.
        device: Where it will run.
        dtype: Type of weights and cache; the directory's own when None.
        backend: What the engine offers to compute with; plain PyTorch when None.
        change: Changes the weights of the transformers model before anything else is done with it: merges a LoRA.

    Raises:
        AdapterError: Not a causal LM that transformers knows, or an attention that is not supported.
        WeightsError: Missing, misshapen, NaN or infinite weights.
    """
    if (directory / "adapter_config.json").exists():  # transformers would load what it names, if PEFT is installed
        raise AdapterError(f"{directory} holds a LoRA as PEFT saves it, which is not an adapter LM by itself")
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
    if change is not None:
        change(model)
    model = model.to(device).eval().requires_grad_(False)
    try:
        _refuse_hidden_attention(model.config.get_text_config())
        adapter = AdapterLM(model, device, backend)
        return UncheckedAdapterLM(adapter, model, _expected(adapter, model))
    except AdapterError:
        raise
    except Exception as exc:
        raise AdapterError(f"a {model.config.model_type} model cannot be run as an adapter LM: {exc}") from exc


def _refuse_hidden_attention(config: Any) -> None:
    """Refuse what a short comparison at load cannot see.

    Raises:
        AdapterError: The keys of a token depend on later tokens, or attention is cut somewhere far behind.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {str(part.get("rope_type")) for part in (rope, *rope.values()) if isinstance(part, dict)}
    if "longrope" in kinds:
        raise AdapterError(
            "rotary embeddings of type longrope change with the length of the text, so that cached keys "
            "would be wrong; they are not supported"
        )
    if getattr(config, "attention_chunk_size", None):
        raise AdapterError("attention in chunks (attention_chunk_size) is not supported")


def _check_weights(model: Any, report: dict[str, Any]) -> None:
    missing = sorted(str(name) for name in report.get("missing_keys", ()))
    mismatched = sorted(str(name) for name in report.get("mismatched_keys", ()))
    if missing or mismatched:
        raise WeightsError(f"weights do not fit config.json: missing {missing[:3]}, wrong shape {mismatched[:3]}")
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise WeightsError(f"weight {name} holds NaN or infinite values")


@torch.inference_mode()
def _choose_implementation(adapter: AdapterLM, model: Any, expected: Tensor) -> Iterator[None]:
    """Take our own layers where they are written and right for this model, else transformers' with our attention.

    Raises:
        AdapterError: Neither gives the logits that the model gives on its own.
    """
    family, dtype = model.config.model_type, adapter.geometry.dtype
    tolerance = self_test_tolerance(dtype)
    try:
        if LeanDecoder.supports(model):
            yield from adapter.use_lean()
            error = yield from largest_error(adapter, expected)
            if error <= tolerance:
                adapter.drop_modules()
                return
            logger.warning("our layers differ by %.3g nats from those of %s; they are not used", error, family)
        adapter.use_modules()
        error = yield from largest_error(adapter, expected)
    except (ValueError, RuntimeError, TypeError, AttributeError, IndexError, KeyError) as exc:
        raise AdapterError(f"a {family} model cannot be run as an adapter LM: {exc}") from exc
    if not error <= tolerance:
        raise AdapterError(
            f"a {family} model gives other logits under paged attention than on its own "
            f"(largest difference {error:.3g} nats); its attention is not supported"
        )


def self_test_tolerance(dtype: torch.dtype) -> float:
    """Largest difference of log-probabilities, in nats, that is rounding."""
    return _SELF_TEST_TOLERANCE.get(dtype, 0.3)


def self_test_tokens(adapter: PackedLM) -> Tensor:
    """Token ids spread over the vocabulary, `[n]`."""
    return torch.arange(min(_SELF_TEST_TOKENS, adapter.max_length)) * 7919 % adapter.num_logits


@torch.inference_mode()
def _expected(adapter: AdapterLM, model: Any) -> Tensor:
    """Log-probabilities of the model's own forward pass after half of the tokens, all but one, and all, `[3, A]`."""
    ids = self_test_tokens(adapter)
    logprobs = torch.log_softmax(model(input_ids=ids[None].to(adapter.device)).logits[0].float(), dim=-1)
    return logprobs[[len(ids) // 2 - 1, len(ids) - 2, len(ids) - 1]]


def _refuse_hidden_window(config: Any, windows: set[int | None]) -> None:
    """Refuse a sliding window that the model puts into its mask alone, which paged attention does not see.

    Raises:
        AdapterError: The configuration has a window and no layer asked for one.
    """
    kinds = getattr(config, "layer_types", None)
    is_used = kinds is None or "sliding_attention" in kinds
    if getattr(config, "sliding_window", None) and is_used and windows == {None}:
        raise AdapterError(f"the sliding window of a {config.model_type} model is in its mask alone: not supported")


def largest_error(adapter: PackedLM, expected: Tensor) -> Generator[None, None, float]:
    """Largest difference of log-probabilities when the tokens come in chunks and one by one, beside a second row.

    Args:
        adapter: What is tried.
        expected: `[3, A]` log-probabilities after half of the test's tokens, all but one, and all.

    Returns:
        It, at the end of the iterator, whose steps are the passes.
    """
    tokens = self_test_tokens(adapter).tolist()
    length, middle = len(tokens), len(tokens) // 2
    pool = KvPool(adapter.geometry, KvBudget(16 * adapter.geometry.block_bytes), adapter.device, min_blocks=16)
    whole, halves = SequenceCache(root=b"whole"), SequenceCache(root=b"halves")
    pool.extend(whole, tokens[:-1])
    pool.extend(halves, tokens[:middle])
    batches = [adapter.batch(pool, [whole, halves], [length - 1, middle])]
    parts = [adapter.forward(batches[-1])]
    yield
    pool.extend(halves, tokens[middle:-1])
    batches.append(adapter.batch(pool, [halves], [length - 1 - middle]))
    parts.append(adapter.forward(batches[-1]))
    yield
    for sequence in (whole, halves):
        pool.extend(sequence, tokens[-1:])
    batches.append(adapter.batch(pool, [whole, halves], [1, 1]))
    parts.append(adapter.forward(batches[-1]))
    _refuse_hidden_window(adapter.config, {window for batch in batches for window in batch.windows})
    got = torch.log_softmax(torch.cat(parts).float(), dim=-1)
    error = (got - expected[[1, 0, 1, 2, 2]]).abs().max()
    return float(error) if bool(torch.isfinite(error)) else float("inf")
