"""What Trimtab reads from vLLM's configuration inside the engine process."""

from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from vllm.config import VllmConfig
from vllm.tokenizers import get_tokenizer

from trimtab_adapters.adapter_lm import Backend
from trimtab_adapters.contract.manifest import vocabulary_fingerprint
from trimtab_adapters.residents import BaseModel as BaseLM
from trimtab_adapters.residents import Residents

CONFIG_KEY = "trimtab"
"""Our key in vLLM's `--additional-config`."""


class EngineConfig(BaseModel):
    """Settings that `trimtab engine` hands to the worker through `--additional-config`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kv_bytes: int = Field(default=1 << 30, gt=0)
    """Budget of the adapter LMs' KV cache, in bytes."""
    weight_bytes: int | None = Field(default=None, gt=0)
    """Budget of the weights of all resident adapter versions, in bytes; None means no bound."""
    dtype: str | None = None
    """Type of adapter weights and cache (`float32`, `bfloat16`, `float16`); the directory's own when None."""


def read_engine_config(vllm_config: VllmConfig) -> EngineConfig:
    """Our part of vLLM's additional configuration."""
    additional: Any = vllm_config.additional_config
    return EngineConfig.model_validate(additional.get(CONFIG_KEY, {}) if isinstance(additional, dict) else {})


def describe_base(vllm_config: VllmConfig) -> BaseLM:
    """What adapters must fit: the base model's vocabulary and context."""
    model_config = vllm_config.model_config
    tokenizer: Any = get_tokenizer(
        model_config.tokenizer,
        tokenizer_mode=model_config.tokenizer_mode,
        trust_remote_code=False,
        revision=model_config.tokenizer_revision,
    )
    vocabulary = tokenizer.get_vocab()
    return BaseLM(
        vocab_size=model_config.get_vocab_size(),
        num_tokens=max(vocabulary.values()) + 1,
        vocabulary_sha256=vocabulary_fingerprint(vocabulary),
        max_model_len=model_config.max_model_len,
    )


def build_residents(vllm_config: VllmConfig, device: torch.device) -> Residents:
    """The empty set of resident versions of a worker."""
    config = read_engine_config(vllm_config)
    dtype = getattr(torch, config.dtype) if config.dtype else None
    return Residents(
        describe_base(vllm_config),
        torch.device(device),
        kv_bytes=config.kv_bytes,
        weight_bytes=config.weight_bytes,
        dtype=dtype,
        backend=backend_for(torch.device(device)),
    )


def backend_for(device: torch.device) -> Backend:
    """What this engine offers to compute with on a device."""
    if device.type != "cpu":
        return Backend()
    # These operators exist in vLLM's CPU build only.
    from trimtab_adapters.vllm.cpu_attention import CpuKernel  # noqa: PLC0415
    from trimtab_adapters.vllm.cpu_ops import CpuOps  # noqa: PLC0415

    return Backend(CpuKernel(), CpuOps())
