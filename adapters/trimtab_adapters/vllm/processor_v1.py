"""The steering core under vLLM's V1 model runner: a batch-level logits processor.

Bound to `vllm.v1.sample.logits_processor.LogitsProcessor` of vLLM 0.32.0. What this shell has to know of the runner:

- `update_state` comes before the forward pass of a step, `apply` after it; a step may have no `apply`.
- `removed` is not the list of requests that left: an index that is refilled by an add or a move shows only there. So
  every added index and every destination of a move closes the row that was there before.
- A preempted request, or one that is not scheduled in a step, is removed and added again with all its outputs.
- The list of output ids is live. Its newest entry may be a placeholder until just before `apply`, so it is read there.
- A request in chunked prefill has a row whose sample is thrown away; the runner's mask says which.
- An exception that leaves a processor kills the engine for good.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from trimtab_adapters.contract.params import XARGS_KEY
from trimtab_adapters.steering import SteeredRow
from trimtab_adapters.vllm.engine_config import build_residents
from trimtab_adapters.vllm.shell import NOT_ATTACHED, SteeringShell

logger = logging.getLogger(__name__)

_UNTRACKED = "internal error while tracking the batch"


class _Occupant:
    """A steered row with the runner's live list of its output ids."""

    __slots__ = ("output_token_ids", "row")

    def __init__(self, row: SteeredRow, output_token_ids: list[int]) -> None:
        self.row = row
        self.output_token_ids = output_token_ids


class SteeringProcessor(SteeringShell, LogitsProcessor):
    """Adds adapter log-probabilities to the logits of the rows that asked for it.

    The worker extension attaches what only the runner knows: `discarded`, the mask of rows whose sample is thrown away,
    `computed`, how many tokens of each row the base has computed when this step is done, `before_step`, a hook called
    when a step's batch is known, and the recording sampler. Until then steered requests fail, because their failures
    could not be reported.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        super().__init__(build_residents(vllm_config, device))
        self.discarded: Callable[[int], np.ndarray[Any, np.dtype[np.bool_]]] | None = None
        self.computed: Callable[[int], Sequence[int]] | None = None
        self.before_step: Callable[[], None] | None = None
        self._occupants: dict[int, _Occupant] = {}

    @override
    def is_argmax_invariant(self) -> bool:
        return False

    @override
    def update_state(self, batch_update: BatchUpdate | None) -> None:
        self.result = None
        try:
            if self.before_step is not None:
                self.before_step()
        except Exception:  # boundary: an exception that leaves a processor kills the engine for good
            logger.exception("the hook before a step failed; the batch is tracked all the same")
        if batch_update is None:
            return
        try:
            self._update(batch_update)
        except Exception:  # boundary, as above
            logger.exception("batch update failed; all steered rows of this batch fail")
            self._fail_batch(batch_update)

    def _fail_batch(self, batch_update: BatchUpdate) -> None:
        """After an update that broke off: nobody knows who is where, so every row that may be steered fails."""
        for index, sampling_params, _, output_token_ids in batch_update.added:
            if XARGS_KEY in (sampling_params.extra_args or {}):
                self._occupants[index] = _Occupant(self.failed_row(_UNTRACKED), output_token_ids)
        for occupant in self._occupants.values():
            occupant.row.error = occupant.row.error or _UNTRACKED

    def _update(self, batch_update: BatchUpdate) -> None:
        for index in batch_update.removed:
            self._evict(index)
        for index, sampling_params, prompt_token_ids, output_token_ids in batch_update.added:
            self._evict(index)
            # Outputs are read in `apply`: now the newest may still be a placeholder.
            row = self.admit(sampling_params.extra_args, prompt_token_ids)
            if row is not None:
                self._occupants[index] = _Occupant(row, output_token_ids)
        for source, target, direction in batch_update.moved:
            moving, standing = self._occupants.pop(source, None), self._occupants.pop(target, None)
            if moving is not None:
                self._occupants[target] = moving
            if standing is not None and direction == MoveDirectionality.SWAP:
                self._occupants[source] = standing
            elif standing is not None:
                self._close(standing.row)
        self.residents.sweep()

    def _evict(self, index: int) -> None:
        occupant = self._occupants.pop(index, None)
        if occupant is not None:
            self._close(occupant.row)

    def _close(self, row: SteeredRow) -> None:
        try:
            self.core.close(row)
        except Exception:  # boundary, as above; the others of the batch must still be told where they are
            logger.exception("a row could not be closed; its blocks may be lost")

    def drop(self, uid: str) -> None:
        """Let go of the row of a request that has ended. The runner says so with its next step, which may take long."""
        for index in [index for index, occupant in self._occupants.items() if occupant.row.params.uid == uid]:
            self._evict(index)

    def steered_indices(self, num_rows: int) -> set[int]:
        """Rows of this step that asked for steering, whether or not their sample counts."""
        return {index for index in self._occupants if index < num_rows}

    @override
    def apply(self, logits: Tensor) -> Tensor:
        if not self._occupants:
            return logits
        num_rows = logits.shape[0]
        try:
            rows = self._rows(num_rows)
        except Exception:  # boundary: an exception that leaves a processor kills the engine for good
            logger.exception("the rows of a step could not be told; all steered rows of this step fail")
            rows = [(occupant.row, index) for index, occupant in self._occupants.items() if index < num_rows]
            for row, _ in rows:
                row.error = row.error or _UNTRACKED
        self.steer(rows, logits)
        return logits

    def _rows(self, num_rows: int) -> Sequence[tuple[SteeredRow, int]]:
        """The steered rows of this step whose sample counts, with their tokens brought up to date."""
        discarded = self.discarded(num_rows) if self.discarded is not None else None
        computed = self.computed(num_rows) if self.computed is not None else None
        rows: list[tuple[SteeredRow, int]] = []
        prefilling: list[tuple[SteeredRow, int]] = []
        for index, occupant in self._occupants.items():
            if index >= num_rows:
                continue
            if discarded is not None and discarded[index]:
                prefilling.append((occupant.row, computed[index] if computed is not None else 0))
                continue
            row = occupant.row
            if self.discarded is None:
                row.error = row.error or NOT_ATTACHED
            row.append(occupant.output_token_ids[row.num_output_tokens :])
            rows.append((row, index))
        self.core.prefill(prefilling)
        return rows
