"""The model that learns from a teacher; it takes the place of the tailored policy in the learner."""

from typing import Any

import torch

from trimtab_training.models import max_positions
from trimtab_training.padding import TokenIds


class Student:
    """A causal LM that is trained alone.

    Args:
        model: Of transformers; all of it has gradients.
        num_known: Number of tokens of the tokenizer; columns beyond it are padding.
    """

    def __init__(self, model: Any, *, num_known: int) -> None:
        self.adapter = model.requires_grad_(True)
        self.num_known = num_known

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.adapter.device
        return device

    def can_read(self, prompt_token_ids: TokenIds, output_token_ids: TokenIds, adapter_prefix: TokenIds) -> bool:
        """Whether a row is not empty, not too long, and without token ids beyond the tokenizer."""
        length = len(adapter_prefix) + len(prompt_token_ids) + len(output_token_ids)
        return (
            bool(prompt_token_ids and output_token_ids)
            and length <= (max_positions(self.adapter) or length)
            and max(*prompt_token_ids, *output_token_ids) < self.num_known
        )
