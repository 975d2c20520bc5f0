"""A sampler around vLLM's V2 sampler: steered log-probabilities in the answer, records of each sampled token.

Installed by the worker extension in place of `model_runner.sampler` of vLLM 0.32.0 (class
`vllm.v1.worker.gpu.sample.sampler.Sampler`, called as `sampler(logits, input_batch)`). It changes no sample, and
everything but the call is the inner sampler's. As in V1, vLLM computes returned log-probabilities from the logits
before any processor; here the rows of steered requests get the steered ones instead, still before temperature, and a
row whose steering failed gets `FAILED_LOGPROB` at its token.

Two things differ from V1. Penalties, logit bias and bad words come before steering here, so the steered
log-probabilities contain all of them, while V1's contain logit bias and bad words but no penalties. And a batch may mix
rows that named their tokens with rows that want the most likely ones.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors

from trimtab_adapters.steering import StepResult
from trimtab_adapters.vllm.shell import SteeringShell


class RecordingSamplerV2:
    """Calls the sampler that it replaces, then corrects and records what concerns steered rows."""

    def __init__(self, inner: Any, shell: SteeringShell) -> None:
        self._inner = inner
        self._shell = shell

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, logits: Tensor, input_batch: Any) -> Any:
        """`[num_rows, V]` logits of the step and vLLM's `InputBatch`, to vLLM's `SamplerOutput`."""
        self._shell.forget_result()
        output = self._inner(logits, input_batch)
        sampled = output.sampled_token_ids[:, 0]
        self._shell.report(sampled, output.logprobs_tensors, partial(self._write_steered, sampled, input_batch))
        return output

    def _write_steered(self, sampled: Tensor, input_batch: Any, result: StepResult, tensors: LogprobsTensors) -> None:
        """Replace the steered rows of vLLM's log-probability tensors, `[num_rows, 1 + columns]`; 0 is the sample."""
        slots = input_batch.idx_mapping_np
        num_top, _ = self._inner.get_logprobs_dims(slots)
        names_tokens = torch.from_numpy(self._inner.logprob_token_ids_state.num_token_ids.np[slots] > 0)
        indices, steered = result.indices, result.steered_logprobs
        token_ids = tensors.logprob_token_ids[indices].long()
        if num_top > 0:
            top = steered.topk(num_top, dim=-1).indices
            keeps_ids = names_tokens.to(indices.device)[indices][:, None]
            token_ids[:, 1 : 1 + num_top] = torch.where(keeps_ids, token_ids[:, 1 : 1 + num_top], top)
        values = steered.gather(1, token_ids)
        # What is minus infinity in the base is padding, or a masked token that is so in the steered logits as well.
        is_padding = tensors.logprobs[indices] == -torch.inf
        own = steered.gather(1, sampled[indices].long()[:, None])
        ranks = (steered >= own).sum(dim=-1)
        tensors.logprob_token_ids[indices] = token_ids.to(tensors.logprob_token_ids.dtype)
        tensors.logprobs[indices] = values.masked_fill(is_padding, -torch.inf)
        tensors.selected_token_ranks[indices] = ranks.to(tensors.selected_token_ranks.dtype)
