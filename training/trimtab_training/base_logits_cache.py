"""The frozen base's logits of rows that were read before: a pool's items and a round's rollouts are read many times."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab_training.logits_reader import LogitsReader
from trimtab_training.padding import TokenIds

_Key = tuple[tuple[int, ...], tuple[int, ...]]


class BaseLogitsCache:
    """A `LogitsReader` for a model that never changes; what was not read for longest goes first.

    A row takes (output tokens) x (vocabulary) numbers of the model's own type: 64 x 32,768 in bfloat16 are 4 MiB. It is
    kept on the CPU, as it came, so a hit gives bit for bit what a forward pass of the row in another batch gives, but
    for the rounding that depends on a batch's shape.

    Args:
        reader: Reads what is not there.
        max_bytes: Budget.
    """

    def __init__(self, reader: LogitsReader, max_bytes: int) -> None:
        self._reader = reader
        self._max_bytes = max_bytes
        self._rows: OrderedDict[_Key, Tensor] = OrderedDict()
        self.num_bytes = 0
        self.num_hits = 0
        self.num_misses = 0

    def __call__(self, model: Any, contexts: Sequence[TokenIds], outputs: Sequence[TokenIds]) -> Tensor:
        """See `LogitsReader`; without gradients."""
        keys = [(tuple(context), tuple(output)) for context, output in zip(contexts, outputs, strict=True)]
        found = {key: self._rows[key] for key in keys if key in self._rows}
        missing = list(dict.fromkeys(key for key in keys if key not in found))
        self.num_hits += sum(key in found for key in keys)
        self.num_misses += len(missing)
        if missing:
            logits = self._reader(model, [key[0] for key in missing], [key[1] for key in missing])
            found |= {key: logits[row, : len(key[1])].cpu() for row, key in enumerate(missing)}
        for key in keys:
            self._keep(key, found[key])
        width = max(map(len, outputs))
        rows = [torch.nn.functional.pad(found[key], (0, 0, 0, width - len(key[1]))) for key in keys]
        return torch.stack(rows).to(model.device)

    def _keep(self, key: _Key, logits: Tensor) -> None:
        if key in self._rows:
            self._rows.move_to_end(key)
            return
        self._rows[key] = logits.clone()  # a slice would keep the whole batch
        self.num_bytes += logits.nbytes
        while self.num_bytes > self._max_bytes:
            _, oldest = self._rows.popitem(last=False)
            self.num_bytes -= oldest.nbytes
