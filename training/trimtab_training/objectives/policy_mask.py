"""The mask of NLPO: which tokens an earlier policy finds probable enough to be drawn.

NLPO: Ramamurthy et al., arXiv 2210.01241. The mask policy is the tailored policy with the adapter of an earlier time:
the base is the same, so drawing under the mask costs a pass of the small model more. V = tokens of the tokenizer.
"""

import copy
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab_training.padding import TokenIds
from trimtab_training.policy import TailoredPolicy
from trimtab_training.sampler import AllowedTokens, CachedModel, smallest_set


class PolicyMask:
    """The smallest set of a mask policy's tokens that has a given probability, and the end tokens.

    Args:
        adapter: The mask policy begins with a copy of it.
        prefix: What the adapter sees before every prompt.
        top_p: Probability that the allowed tokens have together, at least.
        min_tokens: Fewest allowed tokens.
        end_token_ids: Always allowed: without them an output could not end.
    """

    def __init__(
        self, adapter: Any, *, prefix: TokenIds, top_p: float, min_tokens: int, end_token_ids: Collection[int]
    ) -> None:
        self.adapter = copy.deepcopy(adapter).eval().requires_grad_(False)
        self._prefix = prefix
        self._top_p = top_p
        self._min_tokens = min_tokens
        self._end_token_ids = sorted(end_token_ids)

    def become(self, adapter: Any) -> None:
        """From now on the mask policy has this adapter's weights.

        They are copied into the model that is there: whoever holds this mask, the sampler first of all, has them too.
        """
        with torch.no_grad():
            for own, other in zip(self.adapter.parameters(), adapter.parameters(), strict=True):
                own.copy_(other)

    def begin(self, policy: TailoredPolicy, prompt_token_ids: Sequence[TokenIds]) -> AllowedTokens:
        """See `TokenMask`."""
        model = CachedModel(self.adapter, [(*self._prefix, *p) for p in prompt_token_ids], policy.device)

        def allowed(base_logits: Tensor, newest: Tensor | None) -> Tensor:
            logits = policy.steer(base_logits, model.next_logits(newest))
            return self._allowed(logits[..., : policy.num_known])

        return allowed

    @torch.no_grad()
    def over_outputs(
        self, policy: TailoredPolicy, prompt_token_ids: Sequence[TokenIds], output_token_ids: Sequence[TokenIds]
    ) -> Tensor:
        """What may be drawn at each position of B whole outputs, `[B, T, V]`; anything where an output is padded."""
        output = policy.with_adapter(self.adapter).forward(
            prompt_token_ids, output_token_ids, [self._prefix] * len(prompt_token_ids)
        )
        return self._allowed(output.steered_logits[..., : policy.num_known])

    def _allowed(self, logits: Tensor) -> Tensor:
        allowed = smallest_set(torch.softmax(logits, dim=-1), share=self._top_p, min_tokens=self._min_tokens)
        allowed[..., [token for token in self._end_token_ids if token < logits.shape[-1]]] = True
        return allowed
