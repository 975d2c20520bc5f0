"""Directories of adapter LMs that need no torch: a configuration, a word-level tokenizer and one weight."""

import json
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY = {"<eos>": 0, "good": 1, "bad": 2}


def write_safetensors(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    """Write name -> (dtype, shape, bytes), laid out in that order."""
    header, position = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + len(data)]}
        position += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values()))


def float32(values: Any) -> tuple[str, list[int], bytes]:
    """A float32 tensor for `write_safetensors`."""
    array = np.asarray(values, dtype="<f4")
    return "F32", list(array.shape), array.tobytes()


def make_model_directory(
    path: Path, *, weight: float = 1.0, vocabulary: dict[str, int] | None = None, **config: Any
) -> Path:
    """What `save_pretrained` of a causal LM and its tokenizer would leave."""
    path.mkdir(parents=True)
    content = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **config}
    (path / "config.json").write_text(json.dumps(content))
    tokenizer = {"model": {"type": "WordLevel", "vocab": vocabulary or VOCABULARY}, "added_tokens": []}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    write_safetensors(path / "model.safetensors", {"weight": float32([[weight, 2.0], [3.0, 4.0]])})
    return path


def make_lora_directory(path: Path, *, weight: float = 1.0, **config: Any) -> Path:
    """What PEFT's `save_pretrained` of a LoRA would leave, with two of its matrices."""
    path.mkdir(parents=True)
    content = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["q_proj"], **config}
    (path / "adapter_config.json").write_text(json.dumps(content))
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{module}.lora_A.weight": float32([[weight, 0.0]]), f"{module}.lora_B.weight": float32([[1.0], [0.0]])}
    write_safetensors(path / "adapter_model.safetensors", tensors)
    return path
