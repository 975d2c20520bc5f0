"""A sampler around vLLM's V1 sampler: steered log-probabilities in the answer, records of each sampled token.

Installed by the worker extension in place of `model_runner.sampler` of vLLM 0.32.0 (class `Sampler`, called as
`sampler(logits=, sampling_metadata=)`). It changes no sample. vLLM's own sampler computes returned log-probabilities
from the logits before any processor; here the rows of steered requests get the steered ones instead, still before
temperature. A row whose steering failed gets `FAILED_LOGPROB` at its token, which is how the gateway learns of it
before it passes the token on.
"""

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from trimtab_adapters.contract.params import FAILED_LOGPROB
from trimtab_adapters.steering import StepResult
from trimtab_adapters.vllm.cpu_generators import rewound
from trimtab_adapters.vllm.processor_v1 import SteeringProcessor


class RecordingSampler(Sampler):
    """Calls the sampler that it replaces, then corrects and records what concerns steered rows."""

    def __init__(self, inner: Sampler, processor: SteeringProcessor) -> None:
        super().__init__(logprobs_mode=inner.logprobs_mode, use_fp64_gumbel=inner.use_fp64_gumbel)
        self.topk_topp_sampler = inner.topk_topp_sampler
        self._processor = processor

    @override
    def forward(self, logits: Tensor, sampling_metadata: SamplingMetadata, *args: Any, **kwargs: Any) -> SamplerOutput:
        self._processor.forget_result()
        discarded = self._processor.discarded
        with ExitStack() as stack:
            if sampling_metadata.generators and discarded is not None:
                stack.enter_context(rewound(sampling_metadata.generators, discarded(logits.shape[0])))
            if sampling_metadata.max_num_logprobs == 0 and not sampling_metadata.logprob_token_ids:
                return self._sampled_only(logits, sampling_metadata, *args, **kwargs)
            output = super().forward(logits, sampling_metadata, *args, **kwargs)
        sampled = output.sampled_token_ids[:, 0]
        self._processor.report(sampled, output.logprobs_tensors, partial(_write_steered, sampled, sampling_metadata))
        return output

    def _sampled_only(
        self, logits: Tensor, sampling_metadata: SamplingMetadata, *args: Any, **kwargs: Any
    ) -> SamplerOutput:
        """A step in which nobody wants other log-probabilities than those of the sampled tokens: the usual one.

        vLLM would normalise and rank all rows, the steered ones for nothing. Here each row is normalised once.
        """
        num_rows = logits.shape[0]
        steered = self._processor.steered_indices(num_rows)
        others = [index for index in range(num_rows) if index not in steered]
        places = torch.tensor(others, dtype=torch.long, device=logits.device)
        raw = logits[places].float()  # a copy: processors and the temperature change the logits in place
        output = super().forward(logits, replace(sampling_metadata, max_num_logprobs=None), *args, **kwargs)
        sampled = output.sampled_token_ids[:, 0]
        column = sampled.long()[:, None]
        # A row that asks for steering and gets none in this step must not look as if all were well.
        logprobs = torch.full((num_rows, 1), FAILED_LOGPROB, device=logits.device)
        ranks = torch.zeros(num_rows, dtype=torch.long, device=logits.device)
        logprobs[places], ranks[places] = _at(self.compute_logprobs(raw), column[places])

        def write_steered(result: StepResult, _: LogprobsTensors) -> None:
            indices = result.indices
            logprobs[indices], ranks[indices] = _at(result.steered_logprobs, column[indices])

        output.logprobs_tensors = LogprobsTensors(column.to(torch.int32), logprobs, ranks)
        self._processor.report(sampled, output.logprobs_tensors, write_steered)
        return output


def _at(logprobs: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Values `[R, 1]` of `[R, V]` at the tokens `[R, 1]`, and their ranks `[R]` as vLLM counts them, from 1."""
    values = logprobs.gather(1, column)
    # PyTorch sums bytes four times faster than truth values.
    return values, (logprobs >= values).view(torch.uint8).sum(dim=-1)


def _write_steered(sampled: Tensor, metadata: SamplingMetadata, result: StepResult, tensors: LogprobsTensors) -> None:
    """Replace the steered rows of vLLM's log-probability tensors."""
    indices, steered = result.indices, result.steered_logprobs
    if tensors.logprob_token_ids.numel() == 0:  # the whole vocabulary, unsorted
        tensors.logprobs[indices] = steered
    elif metadata.logprob_token_ids:  # tokens named by the caller; padding is minus infinity
        values = steered.gather(1, tensors.logprob_token_ids[indices].long())
        is_padding = tensors.logprobs[indices] == -torch.inf
        tensors.logprobs[indices] = values.masked_fill(is_padding, -torch.inf)
        ranks = (steered >= values[:, :1]).sum(dim=-1)  # column 0 is the sampled token
        tensors.selected_token_ranks[indices] = ranks.to(tensors.selected_token_ranks.dtype)
    else:
        num_logprobs = tensors.logprob_token_ids.shape[1] - 1
        ours = Sampler.gather_logprobs(steered, num_logprobs, token_ids=sampled[indices].long())
        tensors.logprob_token_ids[indices] = ours.logprob_token_ids.to(tensors.logprob_token_ids.dtype)
        tensors.logprobs[indices] = ours.logprobs
        tensors.selected_token_ranks[indices] = ours.selected_token_ranks.to(tensors.selected_token_ranks.dtype)
