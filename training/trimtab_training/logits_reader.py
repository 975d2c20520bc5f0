"""How a causal LM reads a batch of contexts and outputs in training: padded to a rectangle, or packed end to end.

Both give the same numbers. Padding wastes the arithmetic of the padding; packing puts several rows one after another
into one sequence, in which none sees another, and pays for attention masks instead. It is the faster one when lengths
differ much.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from trimtab_training.padding import TokenIds, padded, position_ids


class LogitsReader(Protocol):
    """Runs a causal LM over rows, teacher-forced."""

    def __call__(self, model: Any, contexts: Sequence[TokenIds], outputs: Sequence[TokenIds]) -> Tensor:
        """Logits that predict each output token, `[B, longest output, columns]`; whatever is beyond an output is free.

        Args:
            model: A causal LM of transformers with columns logits.
            contexts: B rows of at least one token.
            outputs: B rows of at least one token.
        """
        ...


class PaddedReader:
    """Contexts padded on the left and outputs on the right, so that the output positions are the same last columns."""

    def __call__(self, model: Any, contexts: Sequence[TokenIds], outputs: Sequence[TokenIds]) -> Tensor:
        """See `LogitsReader`."""
        context_ids, context_mask = padded(contexts, left=True, device=model.device)
        output_ids, output_mask = padded(outputs, left=False, device=model.device)
        mask = torch.cat((context_mask, output_mask[:, :-1]), dim=-1)
        logits: Tensor = model(
            input_ids=torch.cat((context_ids, output_ids[:, :-1]), dim=-1),
            attention_mask=mask.long(),
            position_ids=position_ids(mask),
            use_cache=False,
            logits_to_keep=output_ids.shape[1],
        ).logits
        return logits


class PackedReader:
    """Rows one after another in sequences of at most `max_tokens`; a longer row has one of its own.

    transformers keeps rows apart by their positions, which begin again at 0: without an attention mask it takes every
    such place for the beginning of a new sequence.

    Args:
        max_tokens: Tokens of one sequence. The mask over it takes its square.
    """

    def __init__(self, max_tokens: int = 2048) -> None:
        self.max_tokens = max_tokens

    def __call__(self, model: Any, contexts: Sequence[TokenIds], outputs: Sequence[TokenIds]) -> Tensor:
        """See `LogitsReader`."""
        lengths = [len(c) + len(o) - 1 for c, o in zip(contexts, outputs, strict=True)]
        width = max(map(len, outputs))
        rows: dict[int, Tensor] = {}
        for pack in packs(lengths, self.max_tokens):
            logits = self._read(model, [contexts[row] for row in pack], [outputs[row] for row in pack])
            rows |= dict(zip(pack, torch.split(logits, [len(outputs[row]) for row in pack]), strict=True))
        filled = [torch.nn.functional.pad(rows[row], (0, 0, 0, width - len(rows[row]))) for row in range(len(outputs))]
        return torch.stack(filled)

    def _read(self, model: Any, contexts: Sequence[TokenIds], outputs: Sequence[TokenIds]) -> Tensor:
        """Logits of all output positions of one pack, row after row, `[sum of output lengths, columns]`."""
        ids: list[int] = []
        positions: list[int] = []
        kept: list[int] = []
        for context, output in zip(contexts, outputs, strict=True):
            first = len(ids) + len(context) - 1
            ids += [*context, *output[:-1]]
            positions += range(len(context) + len(output) - 1)
            kept += range(first, first + len(output))
        logits: Tensor = model(
            input_ids=torch.tensor([ids], device=model.device),
            position_ids=torch.tensor([positions], device=model.device),
            use_cache=False,
            logits_to_keep=torch.tensor(kept, device=model.device),
        ).logits[0]
        return logits


def packs(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Rows that go into one sequence together: first fit, longest first. A row longer than `max_tokens` goes alone."""
    bins: list[list[int]] = []
    room: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        for number, free in enumerate(room):
            if lengths[row] <= free:
                bins[number].append(row)
                room[number] -= lengths[row]
                break
        else:
            bins.append([row])
            room.append(max_tokens - lengths[row])
    return iter(bins)
