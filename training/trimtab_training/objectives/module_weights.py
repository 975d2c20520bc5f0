"""The weights of an objective's own models, in a checkpoint and back."""

from collections.abc import Mapping

import torch
from torch import Tensor


def weights_of(module: torch.nn.Module, prefix: str) -> dict[str, Tensor]:
    """Each parameter once, also one that two layers share, under `prefix` and its name. Not copies."""
    return {f"{prefix}{name}": parameter.detach() for name, parameter in module.named_parameters()}


def load_weights(module: torch.nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Copy what `weights_of` gave into a module's own parameters; others' prefixes are ignored.

    Raises:
        ValueError: Names or shapes are not the module's; nothing has been copied then.
    """
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    own = dict(module.named_parameters())
    if {name: tensor.shape for name, tensor in found.items()} != {name: tensor.shape for name, tensor in own.items()}:
        raise ValueError(f"the weights under {prefix!r} are not those of this model")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(found[name])
