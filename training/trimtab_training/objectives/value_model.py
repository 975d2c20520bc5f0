"""The value model of PPO: what reward is still to come, read before each output token."""

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from trimtab_training.logits_reader import PaddedReader
from trimtab_training.lora_training import is_lora
from trimtab_training.models import turn_off_dropout
from trimtab_training.padding import TokenIds


class ValueModel(torch.nn.Module):
    """A copy of the adapter's trunk with a linear head, which is 0 everywhere at first.

    It is read as a causal LM is, with the value as its only logit. Its trunk reads what the adapter reads, prefix
    included, and not the base. What has a gradient in the adapter has one in the copy; there is no dropout.

    Args:
        adapter: Causal LM of transformers, also with a LoRA on it, as it is when training begins.
    """

    def __init__(self, adapter: Any) -> None:
        super().__init__()
        language_model = adapter.get_base_model() if is_lora(adapter) else adapter
        self.trunk = copy.deepcopy(language_model.base_model)
        turn_off_dropout(self.trunk)
        hidden_size = int(language_model.config.get_text_config().hidden_size)
        self.head = torch.nn.Linear(hidden_size, 1, device=adapter.device)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.head.weight.device

    @override
    def forward(self, *, logits_to_keep: int, **inputs: Any) -> SimpleNamespace:
        """As of a causal LM: `logits`, `[B, logits_to_keep, 1]` in float32, of the last positions."""
        hidden = self.trunk(**inputs).last_hidden_state[:, -logits_to_keep:]
        return SimpleNamespace(logits=self.head(hidden.float()))

    def values(self, contexts: Sequence[TokenIds], output_token_ids: Sequence[TokenIds]) -> Tensor:
        """The value at the position that predicts each output token; carries the gradient.

        Args:
            contexts: B contexts of at least one token: prefix and prompt.
            output_token_ids: B outputs of at least one token; T is the longest.

        Returns:
            `[B, T]`, meaningless where an output is padded.
        """
        return PaddedReader()(self, contexts, output_token_ids)[..., 0]
