"""Rows of token ids of different lengths as rectangular tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

TokenIds = Sequence[int]


def padded(rows: Sequence[TokenIds], *, left: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask of rows padded with 0, on the left or on the right, `[B, longest]` each; True at real tokens."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, tokens in enumerate(rows):
        where = slice(width - len(tokens), width) if left else slice(0, len(tokens))
        ids[row, where] = torch.tensor(tokens, dtype=torch.long)
        mask[row, where] = True
    return ids.to(device), mask.to(device)


def position_ids(mask: Tensor) -> Tensor:
    """Positions that count real tokens only, `[B, L]`; padding in front gets 0."""
    return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)
