"""The weights of a LoRA as PEFT saves them: read, checked, and merged where they cannot be applied beside a shared LM.

Letters: r rank, in and out the widths of a linear layer.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trimtab_adapters.contract.errors import AdapterError, WeightsError
from trimtab_adapters.contract.lora import PEFT_WEIGHTS_FILE, LoraConfig, read_lora_config
from trimtab_adapters.contract.manifest import LORA_CONFIG_FILE, LORA_WEIGHTS_FILE

_TENSOR_NAME = re.compile(r"base_model\.model\.(?P<module>[A-Za-z0-9_.]+)\.lora_(?P<side>[AB])\.weight")
_OTHER_KINDS = {
    "lora_embedding_": "updates of embeddings are",
    "lora_magnitude_vector": "DoRA is",
    ".bias": "trained biases are",
}


@dataclass(frozen=True, slots=True)
class LowRank:
    """The update of one linear layer, float32 on the host.

    Attributes:
        down: `[r, in]`, PEFT's A.
        up: `[out, r]`, PEFT's B times the scaling.
    """

    down: Tensor
    up: Tensor

    @property
    def dense(self) -> Tensor:
        """`[out, in]`, what is added to the layer's weight."""
        return self.up @ self.down


def read_lora(directory: Path) -> tuple[LoraConfig, dict[str, LowRank]]:
    """The configuration and the updates, by module name, of a LoRA's version directory.

    Raises:
        ManifestError: The configuration is refused.
        AdapterError: A tensor belongs to something that is not supported.
        WeightsError: The file is not readable, a half is missing, shapes do not fit, or a number is NaN or infinite.
    """
    config = read_lora_config(directory / LORA_CONFIG_FILE)
    try:
        tensors = load_file(directory / LORA_WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as exc:
        raise WeightsError(f"{PEFT_WEIGHTS_FILE} cannot be read: {exc}") from exc
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR_NAME.fullmatch(name)
        if match is None:
            kind = next(
                (kind for part, kind in _OTHER_KINDS.items() if part in name), "only LoRAs of linear layers are"
            )
            what = kind if kind.startswith("only") else f"{kind} not"
            raise AdapterError(f"{PEFT_WEIGHTS_FILE} holds {name!r}: {what} supported")
        if tensor.dim() != 2 or not tensor.is_floating_point():
            raise WeightsError(
                f"{name} has the shape {list(tensor.shape)} and type {tensor.dtype}; a LoRA has matrices"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise WeightsError(f"weight {name} holds NaN or infinite values")
        halves.setdefault(match["module"], {})[match["side"]] = tensor.float()
    return config, {module: _update(config, module, sides) for module, sides in halves.items()}


def _update(config: LoraConfig, module: str, sides: Mapping[str, Tensor]) -> LowRank:
    if sides.keys() != {"A", "B"}:
        raise WeightsError(f"{PEFT_WEIGHTS_FILE} holds only lora_{'/'.join(sides)} of {module}")
    down, up = sides["A"], sides["B"]
    rank = config.rank(module)
    if down.shape[0] != rank or up.shape[1] != rank:
        raise WeightsError(
            f"the LoRA of {module} has the shapes {list(down.shape)} and {list(up.shape)}; its rank is {rank}"
        )
    return LowRank(down, up * config.scaling(module))


def check_modules(config: LoraConfig, updates: Mapping[str, LowRank], linears: Mapping[str, tuple[int, int]]) -> None:
    """Check that updates go with linear layers, given as (out, in) by module name.

    Raises:
        AdapterError: An update is of something else.
        WeightsError: The shapes differ, or an update that the configuration names is missing.
    """
    for module, update in updates.items():
        if module not in linears:
            raise AdapterError(
                f"the LoRA changes {module}, which is not one of the linear layers in this LM's decoder layers; other "
                "modules (embeddings, the output head) are not supported"
            )
        found = (update.up.shape[0], update.down.shape[1])
        if found != linears[module]:
            raise WeightsError(
                f"the LoRA of {module} is for a layer of {found} (out, in), this one has {linears[module]}"
            )
    if missing := sorted(_required(config, linears) - updates.keys()):
        raise WeightsError(f"{PEFT_WEIGHTS_FILE} has no update of {missing[0]} ({len(missing)} are missing)")


def _required(config: LoraConfig, modules: Iterable[str]) -> set[str]:
    ends = config.required_modules
    return {name for name in modules if any(name == end or name.endswith("." + end) for end in ends)}


@torch.no_grad()
def merge(model: Any, config: LoraConfig, updates: Mapping[str, LowRank]) -> None:
    """Add a LoRA to a transformers model's own weights.

    Raises:
        AdapterError: An update is of something else than a linear layer in the decoder.
        WeightsError: The shapes differ, or the sum is not finite in the weights' type.
    """
    head = model.get_output_embeddings()
    modules = {
        name: module for name, module in model.named_modules() if type(module) is torch.nn.Linear and module is not head
    }
    check_modules(config, updates, {name: (m.out_features, m.in_features) for name, m in modules.items()})
    for name, update in updates.items():
        weight = modules[name].weight
        merged = weight.float() + update.dense.to(weight.device)
        weight.copy_(merged)
        if not bool(torch.isfinite(weight).all()):
            raise WeightsError(f"the LoRA makes {name} NaN or infinite in {weight.dtype}")
