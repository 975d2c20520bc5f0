"""What the two models say about the tokens of samples, by one pass of each over every sample."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from trimtab_training.policy import TailoredPolicy, evaluating
from trimtab_training.rollouts import Sample

_ROWS_PER_FORWARD = 32

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TokenSums:
    """Sums over the output tokens of each sample, `[samples]` each, in nats; 0 where the models cannot read it.

    Attributes:
        num_tokens: How many tokens were read.
        base_logprob: The base's log-probabilities of them.
        steered_logprob: The tailored policy's.
        kl: KL(steered || base) at their positions.
        base_entropy: Entropy of the base at their positions.
        steered_entropy: Likewise of the tailored policy.
    """

    num_tokens: Floats
    base_logprob: Floats
    steered_logprob: Floats
    kl: Floats
    base_entropy: Floats
    steered_entropy: Floats

    @property
    def num_unread(self) -> int:
        """Samples that add nothing: without tokens, too long, or with tokens that the tokenizer does not have."""
        return int((self.num_tokens == 0).sum())


def sum_tokens(policy: TailoredPolicy, samples: Sequence[Sample], adapter_prefix: Sequence[int]) -> TokenSums:
    """Run both models over samples, many rows at a time."""
    readable = [
        index
        for index, sample in enumerate(samples)
        if policy.can_read(sample.prompt_token_ids, sample.output_token_ids, adapter_prefix)
    ]
    readable.sort(key=lambda index: len(samples[index].output_token_ids))
    sums = np.zeros((6, len(samples)))
    with evaluating(policy.adapter):
        for start in range(0, len(readable), _ROWS_PER_FORWARD):
            rows = readable[start : start + _ROWS_PER_FORWARD]
            output = policy.forward(
                [samples[index].prompt_token_ids for index in rows],
                [samples[index].output_token_ids for index in rows],
                [tuple(adapter_prefix)] * len(rows),
            )
            steered_logprobs, base_logprobs = output.token_logprobs()
            columns = (
                output.mask,
                base_logprobs,
                steered_logprobs,
                output.kl(),
                _entropy(output.base_logits).masked_fill(~output.mask, 0.0),
                _entropy(output.steered_logits).masked_fill(~output.mask, 0.0),
            )
            for row, column in zip(sums, columns, strict=True):
                row[rows] = column.double().sum(dim=-1).cpu().numpy()
    return TokenSums(*sums)


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    """Of each row of logits, `[..., V]` -> `[...]`; impossible tokens add nothing."""
    entropy: torch.Tensor = torch.special.entr(torch.softmax(logits, dim=-1)).sum(dim=-1)
    return entropy
