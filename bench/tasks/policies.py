"""The policies beside the tailored one that a task compares: a fine-tuned base, and a pair of experts."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from trimtab_adapters import mixing
from trimtab_training.policy import TailoredPolicy


class FineTunedPolicy(TailoredPolicy):
    """The case without a product: what is trained is the policy, and the base only says how far it has moved.

    With a copy of the base as `adapter`, every objective fine-tunes the base itself, with the same KL term, the same
    rollouts and the same steps as it trains an adapter LM.
    """

    @override
    def steer(self, base_logits: Tensor, adapter_logits: Tensor) -> Tensor:
        """The trained model's log-probabilities, `[..., V]` in float32; ids that it does not know get its floor."""
        return mixing.adapter_logprobs(adapter_logits, vocab_size=base_logits.shape[-1], num_known=self.num_known)


class ExpertPair(torch.nn.Module):
    """Expert and anti-expert of DExperts (arXiv 2105.03023) as one adapter LM.

    Its logits are log p(expert) - log p(anti-expert). The tailored policy normalises them once more, which subtracts
    the same number from every token and so changes nothing: softmax(b + alpha (log e - log a)).

    Args:
        expert: Causal LM of transformers.
        anti_expert: Likewise, with the same vocabulary.
    """

    def __init__(self, expert: Any, anti_expert: Any) -> None:
        super().__init__()
        self.expert = expert
        self.anti_expert = anti_expert
        self.config = expert.config

    @property
    def device(self) -> torch.device:
        """Where both are."""
        device: torch.device = self.expert.device
        return device

    @override
    def forward(self, past_key_values: Any = None, **inputs: Any) -> SimpleNamespace:
        """As a causal LM of transformers; the caches of both stand together in `past_key_values`."""
        caches = past_key_values or (None, None)
        outputs = [
            model(past_key_values=cache, **inputs)
            for model, cache in zip((self.expert, self.anti_expert), caches, strict=True)
        ]
        expert, anti_expert = (torch.log_softmax(output.logits.float(), dim=-1) for output in outputs)
        return SimpleNamespace(
            logits=expert - anti_expert, past_key_values=tuple(output.past_key_values for output in outputs)
        )
