"""What the steering core needs around it under either of vLLM's model runners.

A *shell* is a logits processor of one runner's interface. Both check requests alike, steer a step without ever raising
into the engine, and report what was sampled; only how they learn of rows and tokens differs. Bound to the parts of
vLLM 0.32.0 that both runners share: `SamplingParams` and `LogprobsTensors`.
"""

import logging
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.outputs import LogprobsTensors

from trimtab_adapters.adapter_lm import PackedLM
from trimtab_adapters.contract.errors import AdapterError, InvalidRequestError
from trimtab_adapters.contract.params import FAILED_LOGPROB, SteeringParams
from trimtab_adapters.expert import Expert, base_expert
from trimtab_adapters.kv_pool import KvPool
from trimtab_adapters.record_buffer import RecordBuffer
from trimtab_adapters.residents import Residents
from trimtab_adapters.steering import SteeredRow, SteeringCore, StepResult

logger = logging.getLogger(__name__)

NOT_ATTACHED = "the engine's recording sampler is not attached"
"""Why rows fail before `trimtab_attach`: their failures could not be reported."""

_UNREADABLE = SteeringParams(uid="unreadable", adapters=[])
"""Stands for parameters that cannot be parsed, which the front end refuses; one record serves all of them."""


class SteeringShell:
    """Base of both processors, named before vLLM's own base so that its `validate_params` is the one that is called.

    Attributes:
        boot_id: New in each worker process.
        residents: Adapter versions of this worker.
        records: What was sampled, until it is taken.
        base_lm: The base model over our own blocks, or why it cannot be; the worker extension attaches it.
        result: What the last step did; None when it steered nothing.
    """

    def __init__(self, residents: Residents) -> None:
        self.boot_id = uuid.uuid4().hex
        self.residents = residents
        self.base_lm: PackedLM | AdapterError = AdapterError(NOT_ATTACHED)
        self._base_expert: Expert | None = None
        residents.reclaim = self.drop_base_expert
        self.core = SteeringCore(
            residents.committed, vocab_size=residents.base.vocab_size, base_expert=self.base_expert
        )
        self.records = RecordBuffer()
        self.result: StepResult | None = None

    def base_expert(self) -> Expert:
        """The base model as an expert under another prompt. Its blocks are taken with the first request for it.

        Raises:
            AdapterError: This base, or this engine's configuration, does not allow it.
            PoolExhaustedError: The budget of the adapter KV cache has no room for it.
        """
        if isinstance(self.base_lm, AdapterError):
            raise self.base_lm
        if self._base_expert is None:
            geometry, budget = self.base_lm.geometry, self.residents.budget
            # Few to begin with: a base's blocks are large, and it grows by doubling.
            pool = KvPool(geometry, budget, self.base_lm.device, min_blocks=4)
            self._base_expert = base_expert(self.base_lm, pool, vocab_size=self.residents.base.vocab_size)
        return self._base_expert

    def drop_base_expert(self) -> bool:
        """Give the base expert's blocks back, if no row uses it. Returns whether there were any to give."""
        expert = self._base_expert
        if expert is None or expert.num_rows:
            return False
        self.residents.budget.allocated_bytes -= expert.pool.num_blocks * expert.pool.geometry.block_bytes
        self._base_expert = None
        return True

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse malformed steering in the front end, with a 400."""
        try:
            params = SteeringParams.from_extra_args(sampling_params.extra_args)
        except InvalidRequestError as exc:
            raise ValueError(exc.message) from exc
        has_logprobs = sampling_params.logprobs is not None or bool(sampling_params.logprob_token_ids)
        if params is not None and params.needs_row and not has_logprobs:
            raise ValueError(
                "a steered request must ask for logprobs (0 is enough): they are how a failed row is reported"
            )

    def admit(
        self,
        extra_args: dict[str, Any] | None,
        prompt_token_ids: Sequence[int] | None,
        num_prompt_tokens: int | None = None,
    ) -> SteeredRow | None:
        """The row of a request, None when it wants no steering. Never raises: what is wrong is in the row's `error`.

        Args:
            extra_args: Of the request's sampling parameters.
            prompt_token_ids: The prompt as far as it is known; None where there are no ids.
            num_prompt_tokens: Length of a prompt whose ids come later.
        """
        try:
            params = SteeringParams.from_extra_args(extra_args)
            if params is None or not params.needs_row:
                return None
            return self.core.open(params, prompt_token_ids, (), num_prompt_tokens=num_prompt_tokens)
        except InvalidRequestError as exc:
            return self.failed_row(exc.message)
        except Exception:  # boundary: an exception that leaves a processor kills the engine for good
            logger.exception("a request could not be admitted; it fails")
            return self.failed_row("internal error while admitting the request")

    def failed_row(self, reason: str) -> SteeredRow:
        """A row that asked for steering and cannot have it."""
        row = self.core.open(_UNREADABLE, (), ())
        row.error = reason
        return row

    def forget_result(self) -> None:
        """Drop the last step's result, so that a step without steered rows leaves none."""
        self.result = None

    def steer(self, rows: Sequence[tuple[SteeredRow, int]], logits: Tensor) -> None:
        """One step of the core, in place. Whatever goes wrong, the rows carry it and nothing is raised.

        Args:
            rows: The steered rows whose sample counts, with their index in `logits`.
            logits: `[num_rows, V]` float32.
        """
        try:
            self.result = self.core.step(rows, logits)
        except Exception as exc:  # boundary: an exception that leaves a processor kills the engine for good
            logger.exception("a steering step failed; its rows fail")
            for row, _ in rows:
                row.error = row.error or f"internal error in a steering step: {type(exc).__name__}"
            self.result = self.core.step(rows, logits)  # all rows carry an error now: nothing is computed

    def report(
        self,
        sampled_token_ids: Tensor,
        tensors: LogprobsTensors | None,
        write_steered: Callable[[StepResult, LogprobsTensors], None],
    ) -> None:
        """After sampling: record the last step, and put its log-probabilities or its failures into vLLM's own.

        Args:
            sampled_token_ids: `[num_rows]` of the whole step, integer.
            tensors: The step's log-probabilities, None when nobody asked for any; changed in place.
            write_steered: Replaces the rows of the result in them; how depends on the runner's sampler.
        """
        result = self.result
        if result is None:
            return
        try:
            self.records.observe(result, sampled_token_ids)
            if tensors is not None and result.rows:
                write_steered(result, tensors)
        except Exception:  # boundary: an exception that leaves the sampler kills the engine for good
            logger.exception("recording failed; the steered rows of this step fail")
            result.fail_all("internal error while recording log-probabilities")
            try:
                self.records.observe(result, sampled_token_ids)
            except Exception:  # the mark below still tells the gateway that these rows failed
                logger.exception("the reason of the failure could not be recorded either")
        if tensors is not None and result.failed:
            indices = torch.tensor([index for _, index in result.failed], device=tensors.logprobs.device)
            tensors.logprobs[indices] = FAILED_LOGPROB
