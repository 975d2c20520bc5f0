"""LoRAs as PEFT saves them, and the models that they stand for."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tiny_models import write_tokenizer

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."

# What `LoraConfig(...).save_pretrained` of PEFT 0.17 writes, save for the values that a test gives.
_DEFAULTS: dict[str, Any] = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": "/somewhere/on/the/machine/that/trained",
    "bias": "none",
    "corda_config": None,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_dropout": 0.05,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "qalora_group_size": 16,
    "rank_pattern": {},
    "revision": None,
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}


def write_model(directory: Path, family: str, *, seed: int, **options: Any) -> Path:
    """A random model of a family of transformers with the tiny vocabulary, its biases not zero."""
    import transformers

    common = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = getattr(transformers, f"{family}Config")(**(common | options))
        ending = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
        model = getattr(transformers, f"{family}{ending}")(config)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.12) if parameter.dim() > 1 else parameter.data.add_(
                torch.randn_like(parameter) * 0.1
            )
        model.save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def write_lora(
    directory: Path,
    trunk: Path,
    *,
    seed: int,
    targets: tuple[str, ...] = ATTENTION + MLP,
    r: int = 4,
    lora_alpha: float = 8,
    ranks: dict[str, int] | None = None,
    size: float = 0.3,
    **config: Any,
) -> Path:
    """A random LoRA with both halves not zero. `ranks` gives the ranks that `rank_pattern` leads to, by module."""
    weights = load_file(trunk / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in sorted(weights.items()):
        module = name.removesuffix(".weight")
        if module.split(".")[-1] in targets and weight.dim() == 2:
            rank = (ranks or {}).get(module, r)
            for side, shape in (("A", (rank, weight.shape[1])), ("B", (weight.shape[0], rank))):
                scale = size / math.sqrt(shape[1])
                tensors[f"{PREFIX}{module}.lora_{side}.weight"] = torch.randn(shape, generator=generator) * scale
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    content = _DEFAULTS | {"r": r, "lora_alpha": lora_alpha, "target_modules": list(targets)} | config
    (directory / "adapter_config.json").write_text(json.dumps(content))
    (directory / "README.md").write_text("a model card")
    return directory


def merged(trunk: Path, lora: Path, scalings: dict[str, float] | None = None) -> Any:
    """transformers' own model, float32, with `W + scaling * B A`; `scalings` where they are not `lora_alpha / r`."""
    model = AutoModelForCausalLM.from_pretrained(trunk, dtype=torch.float32)
    config = json.loads((lora / "adapter_config.json").read_text())
    tensors = load_file(lora / "adapter_model.safetensors")
    for name, down in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            up = tensors[name.replace("lora_A", "lora_B")]
            scaling = (scalings or {}).get(module, config["lora_alpha"] / config["r"])
            model.get_submodule(module).weight.data += scaling * (up @ down)
    return model
