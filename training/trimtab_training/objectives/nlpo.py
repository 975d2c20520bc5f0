"""NLPO: PPO that chooses among the tokens that an earlier policy finds probable.

NLPO: Ramamurthy et al., arXiv 2210.01241. Rounds are drawn from the policy restricted to `PolicyMask` and renormalised.
What was allowed at each token is kept with the round, so that the ratios compare new and old log-probabilities over the
same choices; the KL penalty is that of the policy without a mask, which is the one that is served. After every few
rounds the mask policy becomes the trained one.

V = tokens of the tokenizer. The masks of a round take V / 8 bytes per output token.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trimtab_training.objectives.module_weights import load_weights, weights_of
from trimtab_training.objectives.objective import ObjectiveState, ScoredRollout, TokenIds
from trimtab_training.objectives.policy_mask import PolicyMask
from trimtab_training.policy import PolicyOutput, TailoredPolicy, evaluating

Floats = NDArray[np.float64]

_MASK = "mask."
_ROWS_PER_FORWARD = 32


class MaskedVocabulary:
    """NLPO's action space.

    Args:
        mask: What rounds are drawn under.
        adapter: The one that is trained.
        prefix: What it sees before every prompt.
        interval: Rounds after which the mask policy becomes the trained one.
    """

    def __init__(self, mask: PolicyMask, adapter: Any, *, prefix: TokenIds, interval: int) -> None:
        self.token_mask = mask
        self._adapter = adapter
        self._prefix = prefix
        self._interval = interval
        self._num_rounds = 0
        self._bits: list[NDArray[np.uint8]] = []

    def begin_round(self, rollouts: Sequence[ScoredRollout], policy: TailoredPolicy) -> list[Floats]:
        """See `ActionSpace`. The masks are computed again, by the policies that drew under them.

        A token on the edge of a mask can fall to the other side by rounding; one that was drawn was allowed.
        """
        self._num_rounds += bool(rollouts)
        self._bits = []
        old: list[Floats] = []
        for start in range(0, len(rollouts), _ROWS_PER_FORWARD):
            part = rollouts[start : start + _ROWS_PER_FORWARD]
            prompts, outputs = [r.prompt_token_ids for r in part], [r.output_token_ids for r in part]
            with evaluating(policy.adapter):
                output = policy.forward(prompts, outputs, [self._prefix] * len(part))
                allowed = self.token_mask.over_outputs(policy, prompts, outputs)
                allowed.scatter_(-1, output.output_token_ids[..., None], True)
                logprobs = masked_logprobs(output, allowed).double().cpu().numpy()
            for row, tokens in enumerate(outputs):
                old.append(logprobs[row, : len(tokens)])
                self._bits.append(np.packbits(allowed[row, : len(tokens)].cpu().numpy(), axis=-1))
        return old

    def logprobs(self, output: PolicyOutput, rows: Sequence[int]) -> Tensor:
        """See `ActionSpace`."""
        return masked_logprobs(output, self.allowed(rows, output.mask))

    def allowed(self, rows: Sequence[int], mask: Tensor) -> Tensor:
        """What could be drawn at each output token of some rows of the round, `[B, T, at least V]`.

        Args:
            rows: B rows' numbers.
            mask: `[B, T]`, True at their output tokens; elsewhere everything is allowed.
        """
        bits = np.concatenate([self._bits[row] for row in rows])
        unpacked = torch.from_numpy(np.unpackbits(bits, axis=-1).astype(bool)).to(mask.device)
        allowed = torch.ones(*mask.shape, unpacked.shape[-1], dtype=torch.bool, device=mask.device)
        allowed[mask] = unpacked
        return allowed

    def end_round(self) -> None:
        """After every `interval` rounds the mask policy becomes the trained one."""
        if self._num_rounds % self._interval == 0:
            self.token_mask.become(self._adapter)

    def state(self) -> ObjectiveState:
        """The mask policy, and the masks of the round."""
        bits = np.concatenate(self._bits) if self._bits else np.empty((0, 0), dtype=np.uint8)
        lengths = np.array([len(row) for row in self._bits], dtype=np.int64)
        return ObjectiveState(
            arrays={"bits": bits, "lengths": lengths},
            values={"num_rounds": self._num_rounds},
            tensors=weights_of(self.token_mask.adapter, _MASK),
        )

    def load_state(self, state: ObjectiveState) -> None:
        """See `ActionSpace`."""
        load_weights(self.token_mask.adapter, state.tensors, _MASK)
        ends = np.cumsum(state.arrays["lengths"])[:-1]
        self._bits = np.split(state.arrays["bits"], ends) if len(state.arrays["lengths"]) else []
        self._num_rounds = int(state.values["num_rounds"])


def masked_logprobs(output: PolicyOutput, allowed: Tensor) -> Tensor:
    """Log-probability of each output token among the allowed ones, `[B, T]`, 0 where padded; carries the gradient.

    Args:
        output: Of the tailored policy.
        allowed: `[B, T, at least V]`, True at every output token; what lies beyond V, the rest of a last byte, is
            ignored, and so are tokens of the base beyond V.
    """
    width = min(allowed.shape[-1], output.steered_logits.shape[-1])
    logits = output.steered_logits[..., :width].masked_fill(~allowed[..., :width], float("-inf"))
    logprobs = torch.log_softmax(logits, dim=-1).gather(-1, output.output_token_ids[..., None])[..., 0]
    return logprobs.masked_fill(~output.mask, 0.0)
