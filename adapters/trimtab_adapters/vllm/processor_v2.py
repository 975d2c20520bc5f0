"""The steering core under vLLM's Model Runner V2: a logits processor keyed by request slot.

Bound to `vllm.v1.worker.gpu.sample.logits_processor.LogitsProcessor` of vLLM 0.32.0. What this shell has to know of the
runner:

- A request has a *slot* from `add_request` until it finishes, is aborted or preempted. Nobody says when: slots are
  recycled, last freed first, and `add_request` for a slot is the only sign. So it closes the slot's row, and each step
  asks the runner's own table (`is_occupied`) which rows' requests are gone.
- A preempted request comes back as a new one, in any slot, with all its tokens as its prefill.
- `add_request` comes before the runner has written the request's tokens; they are on the device, never on the host.
- `apply_staged_writes` comes in every step, `apply` only when a scheduled request of any processor wants it.
- Rows of the logits are sorted anew in every step; without speculative decoding a scheduled request has one, also in
  chunked prefill, where its sample is thrown away.
- Warm-up sends requests of its own through all this, without `extra_args`.
- An exception that leaves a processor kills the engine for good.

The core keeps token ids on the host. So each step with a steered row copies the newest ids there, of all rows at once,
with what is not known yet of prompts and of rows that came back: exactly one copy, which waits for the step's forward
pass. That is accepted in this first version; the core's own check for NaN waits at the same place.

V2 applies penalties, logit bias and bad words *before* custom processors, V1 applies penalties after them. Presence and
frequency penalties are sums and commute with steering; a repetition penalty multiplies, so here it scales the base's
logits alone, under V1 the steered ones, and the two sample from different distributions. In records, "base" is here
what the penalties left of it.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor, LogitsProcRequestState

from trimtab_adapters.steering import SteeredRow
from trimtab_adapters.vllm.engine_config import build_residents
from trimtab_adapters.vllm.shell import NOT_ATTACHED, SteeringShell

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Scheduled:
    """A steered row in this step.

    Attributes:
        row: It.
        index: Its row in the logits.
        slot: The slot of its request.
        num_tokens: Tokens that the base has seen of it when this step's forward pass is done.
        counts: Whether its sample counts; False in the middle of a prefill.
    """

    row: SteeredRow
    index: int
    slot: int
    num_tokens: int
    counts: bool


class SteeringProcessorV2(SteeringShell, LogitsProcessor):
    """Adds adapter log-probabilities to the logits of the slots that asked for it.

    The worker extension attaches `is_occupied`, which asks the runner whether a slot has a request, together with the
    recording sampler. Until then steered requests fail, because their failures could not be reported.
    """

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        _refuse_unsupported(vllm_config)
        super().__init__(build_residents(vllm_config, req_states.device))
        self.is_occupied: Callable[[int], bool] | None = None
        self._req_states = req_states
        self._rows: dict[int, SteeredRow] = {}

    @override
    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        try:
            self._close(req_idx)
            row = self._open(req_idx, sampling_params)
        except Exception:  # boundary: an exception that leaves a processor kills the engine for good
            logger.exception("a request could not be admitted; it fails")
            row = self.failed_row("internal error while admitting the request")
        if row is None:
            return False
        self._rows[req_idx] = row
        return True

    def _open(self, slot: int, sampling_params: SamplingParams) -> SteeredRow | None:
        """The row of a request that wants steering; its tokens are read with its first sample."""
        num_prompt_tokens = int(self._req_states.prompt_len.np[slot])
        row = self.admit(sampling_params.extra_args, (), num_prompt_tokens)
        if row is not None and self.is_occupied is None:
            row.error = row.error or NOT_ATTACHED
        return row

    def _close(self, slot: int) -> None:
        row = self._rows.pop(slot, None)
        if row is not None:
            self.core.close(row)

    @override
    def apply_staged_writes(self) -> None:
        """Once per step, after requests came and went: let go of what belongs to requests that are gone."""
        try:
            if self.is_occupied is not None:
                for slot in [slot for slot in self._rows if not self.is_occupied(slot)]:
                    self._close(slot)
            self.residents.sweep()
        except Exception:  # boundary: an exception that leaves a processor kills the engine for good
            logger.exception("rows of departed requests could not be closed; they are tried again in the next step")

    @override
    def apply(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        if not self._rows:
            return logits
        try:
            scheduled = self._scheduled(logits.shape[0], ctx)
            self._read_tokens(scheduled, ctx)
        except Exception as exc:  # boundary: an exception that leaves a processor kills the engine for good
            logger.exception("the batch of a step could not be read; its steered rows fail")
            scheduled = self._fail_all(ctx, f"internal error while reading the batch: {type(exc).__name__}")
        self.core.prefill([(member.row, member.num_tokens) for member in scheduled if not member.counts])
        self.steer([(member.row, member.index) for member in scheduled if member.counts], logits)
        return logits

    def _scheduled(self, num_rows: int, ctx: LogitsContext) -> list[_Scheduled]:
        """The steered rows of this step. Reads host memory only."""
        slots: list[int] = ctx.idx_mapping_np.tolist()
        if len(slots) != num_rows:
            raise RuntimeError(f"{num_rows} rows for {len(slots)} requests: draft tokens cannot be steered")
        found: list[_Scheduled] = []
        for index, slot in enumerate(slots):
            row = self._rows.get(slot)
            if row is None:
                continue
            num_tokens = int(ctx.seq_lens_upper_bound_np[index])  # exact without speculative decoding
            counts = num_tokens >= int(self._req_states.prefill_len.np[slot])
            found.append(_Scheduled(row, index, slot, num_tokens, counts))
        return found

    def _fail_all(self, ctx: LogitsContext, reason: str) -> list[_Scheduled]:
        """Every logits row of a steered request, marked as failed."""
        found: list[_Scheduled] = []
        for index, slot in enumerate(ctx.expanded_idx_mapping.tolist()):
            row = self._rows.get(slot)
            if row is not None:
                row.error = row.error or reason
                found.append(_Scheduled(row, index, slot, num_tokens=0, counts=True))
        return found

    def _read_tokens(self, scheduled: Sequence[_Scheduled], ctx: LogitsContext) -> None:
        """Bring the rows' tokens up to date with one copy from the device."""
        healthy = [member for member in scheduled if member.row.error is None]
        histories: list[tuple[_Scheduled, int]] = []
        pieces: list[Tensor] = [ctx.input_ids]
        for member in healthy:
            num_known = len(member.row.tokens)
            if member.num_tokens < num_known:
                member.row.error = "the engine went back behind tokens that it had sampled"
            elif member.num_tokens > num_known + 1:  # part of a prompt, or back after preemption
                pieces.append(self._req_states.all_token_ids.gpu[member.slot, num_known : member.num_tokens])
                histories.append((member, member.num_tokens - num_known))
        if not healthy:
            return
        # The token that a row was fed is the newest one that its sample depends on.
        token_ids: list[int] = (torch.cat(pieces) if histories else ctx.input_ids).tolist()
        for member in healthy:
            if member.row.error is None and member.num_tokens == len(member.row.tokens) + 1:
                member.row.append(token_ids[member.index : member.index + 1])
        start = ctx.input_ids.shape[0]
        for member, count in histories:
            member.row.append(token_ids[start : start + count])
            start += count


def _refuse_unsupported(vllm_config: Any) -> None:
    """Stop an engine at its start whose rows could not be steered.

    Raises:
        ValueError: With what to change.
    """
    if vllm_config.speculative_config is not None:
        raise ValueError("speculative decoding and steering do not go together: draft tokens would not be steered")
    if vllm_config.model_config.enable_prompt_embeds:
        raise ValueError("prompt embeddings cannot be steered, because an adapter LM reads token ids")
    if vllm_config.parallel_config.enable_batch_sharded_sampling:
        raise ValueError("batch-sharded sampling scatters a step's rows over workers; steering needs all in each")
