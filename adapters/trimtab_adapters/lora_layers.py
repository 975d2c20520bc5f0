"""LoRAs applied beside the linear layers of a LM that they share, each packed token by the LoRA of its own row.

A step has few tokens of each LoRA, often one. Products of one token with two small matrices, LoRA by LoRA and layer by
layer, would be thousands of small operations. So the matrices of all LoRAs in use are *stacked*: one product with all
A's, the columns of other rows' LoRAs set to zero, one product with all B's. That multiplies by zero what a loop would
skip, but a step with few tokens costs what reading the weights costs, and each is read once either way.
Rows with many tokens of their own, prompts, are done one LoRA at a time.

Letters: T new tokens of all rows, S of them in the stack, C its columns (the ranks of all LoRAs), r rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from trimtab_adapters.dense_ops import DenseOps, Linear
from trimtab_adapters.lora_weights import LowRank

MIN_LONG_TOKENS = 32
"""From so many tokens of one LoRA in a pass on they are done apart from the stack."""
_STACK_PASSES = 64
"""After so many passes a stack is made smaller if less than half of it was used."""


class LinearUpdates(Protocol):
    """What changes the outputs of a decoder's fused linear layers in one pass."""

    def add(self, layer: int, site: str, x: Tensor, y: Tensor) -> None:
        """Add the updates of one product to its output in place: `x` `[T, in]`, `y` `[T, out]`."""


@dataclass(frozen=True, slots=True)
class Part:
    """The update of one of the modules that make up a fused product.

    Attributes:
        begin: Its first column in the product's output.
        end: One past its last column.
        down: `[r, in]`.
        up: `[end - begin, r]`, scaling included.
    """

    begin: int
    end: int
    down: Tensor
    up: Tensor


Site = tuple[int, str]
"""Number of the layer, and which product in it."""


class LoraLayers:
    """A LoRA's matrices by the product that they belong to, in the type and on the device of its trunk."""

    def __init__(self, parts: Mapping[Site, Sequence[Part]]) -> None:
        self.parts: dict[Site, Sequence[Part]] = dict(parts)
        tensors = [tensor for group in parts.values() for part in group for tensor in (part.down, part.up)]
        self.weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def opposite(self) -> "LoraLayers":
        """The LoRA that undoes this one."""
        return LoraLayers(
            {site: [Part(p.begin, p.end, p.down, -p.up) for p in group] for site, group in self.parts.items()}
        )


def place_updates(
    updates: Mapping[str, LowRank],
    places: Mapping[str, tuple[Site, int, int]],
    dtype: torch.dtype,
    device: torch.device,
) -> LoraLayers:
    """Sort a LoRA's updates by product.

    Args:
        updates: By module name.
        places: For each module its product and its columns there, from and to.
        dtype: Type of the trunk.
        device: Where the trunk is.
    """
    parts: dict[Site, list[Part]] = {}
    for module, update in updates.items():
        site, begin, end = places[module]
        part = Part(begin, end, update.down.to(device, dtype), update.up.to(device, dtype))
        parts.setdefault(site, []).append(part)
    return LoraLayers(parts)


@dataclass(frozen=True, slots=True)
class _StackedSite:
    """One product's updates of all LoRAs of a stack.

    Attributes:
        down: `[S, in]` -> `[S, C]`; columns are ordered by module, then by LoRA.
        ups: For each module its columns of C, its columns of the output, and their product.
        layout: Which of the stack's `layouts` says whose column is whose.
    """

    down: Linear
    ups: tuple[tuple[slice, slice, Linear], ...]
    layout: int


class LoraStack:
    """The matrices of several LoRAs of one trunk side by side: a copy.

    Attributes:
        places: Place of each LoRA by the identity of its object.
        sites: The stacked products.
        layouts: `[C]` for each column the place of its LoRA. Most products have the same.
    """

    def __init__(self, loras: Sequence[LoraLayers], ops: DenseOps, device: torch.device) -> None:
        self.loras = tuple(loras)  # held, so that no other object gets the identity of one of them
        self.places = {id(lora): place for place, lora in enumerate(loras)}
        self.weight_bytes = sum(lora.weight_bytes for lora in loras)
        self.sites: dict[Site, _StackedSite] = {}
        layouts: dict[tuple[int, ...], int] = {}
        for site in sorted({site for lora in loras for site in lora.parts}):
            groups = [lora.parts.get(site, ()) for lora in loras]
            downs: list[Tensor] = []
            owners: list[int] = []
            ups: list[tuple[slice, slice, Linear]] = []
            for begin, end in sorted({(part.begin, part.end) for group in groups for part in group}):
                first = len(owners)
                of_module = [(place, p) for place, group in enumerate(groups) for p in group if p.begin == begin]
                for place, part in of_module:
                    downs.append(part.down)
                    owners.extend([place] * part.down.shape[0])
                up = ops.linear(torch.cat([part.up for _, part in of_module], dim=1), None)
                ups.append((slice(first, len(owners)), slice(begin, end), up))
            layout = layouts.setdefault(tuple(owners), len(layouts))
            self.sites[site] = _StackedSite(ops.linear(torch.cat(downs), None), tuple(ups), layout)
        self.layouts = [torch.tensor(owners, device=device) for owners in layouts]


class LoraStacks:
    """The stack of the LoRAs that are in use on one trunk.

    One with LoRAs that are not used costs time, making one costs more. So it grows when a LoRA comes that is not in it,
    and shrinks only now and then.
    """

    def __init__(self, ops: DenseOps, device: torch.device) -> None:
        self._ops = ops
        self._device = device
        self._stack: LoraStack | None = None
        self._recent: dict[int, LoraLayers] = {}
        self._num_passes = 0

    @property
    def weight_bytes(self) -> int:
        """Memory of the copies."""
        return 0 if self._stack is None else self._stack.weight_bytes

    def stack_for(self, loras: Sequence[LoraLayers]) -> LoraStack:
        """A stack that holds these, and perhaps others."""
        self._recent.update((id(lora), lora) for lora in loras)
        self._num_passes += 1
        stack = self._stack
        if stack is None:
            return self._build(loras)
        if missing := [lora for lora in loras if id(lora) not in stack.places]:
            return self._build([*stack.loras, *missing])
        if self._num_passes >= _STACK_PASSES:
            recent = list(self._recent.values())
            if 2 * len(recent) < len(stack.places):
                return self._build(recent)
            self._recent, self._num_passes = {}, 0
        return stack

    def _build(self, loras: Sequence[LoraLayers]) -> LoraStack:
        self._stack = None  # before the new one is made: both together may not fit
        self._recent, self._num_passes = {}, 0
        self._stack = LoraStack(loras, self._ops, self._device)
        return self._stack

    def discard(self, lora: LoraLayers) -> None:
        """Let go of a LoRA that is no longer resident."""
        self._recent.pop(id(lora), None)
        if self._stack is not None and id(lora) in self._stack.places:
            self._stack = None


class LoraPass(LinearUpdates):
    """The LoRAs of one packed pass.

    Args:
        stacks: Of the trunk.
        loras: Of each row.
        num_new: New tokens of each row, in the order in which they are packed.
        device: Where the trunk is.
    """

    def __init__(
        self, stacks: LoraStacks, loras: Sequence[LoraLayers], num_new: Sequence[int], device: torch.device
    ) -> None:
        tokens: dict[int, list[int]] = {}
        start = 0
        for lora, count in zip(loras, num_new, strict=True):
            tokens.setdefault(id(lora), []).extend(range(start, start + count))
            start += count
        by_id = {id(lora): lora for lora in loras}
        self._long = [
            (None if len(indices) == start else torch.tensor(indices, device=device), by_id[key])
            for key, indices in tokens.items()
            if len(indices) >= MIN_LONG_TOKENS
        ]
        short = {key: indices for key, indices in tokens.items() if len(indices) < MIN_LONG_TOKENS}
        self._stack: LoraStack | None = None
        if short:
            self._stack = stack = stacks.stack_for([by_id[key] for key in short])
            pairs = sorted((token, stack.places[key]) for key, indices in short.items() for token in indices)
            self._index = None if len(pairs) == start else torch.tensor([token for token, _ in pairs], device=device)
            owner = torch.tensor([place for _, place in pairs], device=device)
            # `[S, C]`, true where a column belongs to another LoRA than the token; not needed when there is only one.
            is_mixed = len(stack.loras) > 1
            self._masks = [owner[:, None] != owners for owners in stack.layouts] if is_mixed else None

    @override
    def add(self, layer: int, site: str, x: Tensor, y: Tensor) -> None:
        key = (layer, site)
        for index, lora in self._long:
            chosen = x if index is None else x[index]
            for part in lora.parts.get(key, ()):
                _add(y[:, part.begin : part.end], index, F.linear(F.linear(chosen, part.down), part.up))
        stacked = self._stack.sites.get(key) if self._stack is not None else None
        if stacked is not None:
            inner = stacked.down(x if self._index is None else x[self._index])
            if self._masks is not None:
                # Filled, not multiplied: what another's LoRA makes of this row may be infinite.
                inner = inner.masked_fill_(self._masks[stacked.layout], 0.0)
            for columns, outputs, up in stacked.ups:
                _add(y[:, outputs], self._index, up(inner[:, columns].contiguous()))


def _add(y: Tensor, index: Tensor | None, delta: Tensor) -> None:
    if index is None:
        y += delta
    else:
        y.index_add_(0, index, delta)


class DenseUpdates(LinearUpdates):
    """One LoRA as the full matrices that it stands for, float32: the reference that `LoraPass` is compared with."""

    def __init__(
        self, updates: Mapping[str, LowRank], places: Mapping[str, tuple[Site, int, int]], device: torch.device
    ) -> None:
        self._updates: dict[Site, list[tuple[slice, LowRank]]] = {}
        for module, update in updates.items():
            site, begin, end = places[module]
            self._updates.setdefault(site, []).append((slice(begin, end), update))
        self._device = device

    @override
    def add(self, layer: int, site: str, x: Tensor, y: Tensor) -> None:
        for outputs, update in self._updates.get((layer, site), ()):
            y[:, outputs] += F.linear(x.float(), update.dense.to(self._device)).to(y.dtype)
