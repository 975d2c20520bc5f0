"""Among which tokens a policy chooses: what the log-probabilities of PPO's ratios are normalised over.

PPO chooses among the whole vocabulary, NLPO (`nlpo.py`) among what its mask allows.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from trimtab_training.objectives.objective import ObjectiveState, ScoredRollout
from trimtab_training.policy import PolicyOutput, TailoredPolicy
from trimtab_training.sampler import TokenMask

Floats = NDArray[np.float64]


class ActionSpace(Protocol):
    """What may be chosen at each token of a round, and how likely each choice was and is."""

    @property
    def token_mask(self) -> TokenMask | None:
        """What rounds are drawn under; None where every token may be drawn."""
        ...

    def begin_round(self, rollouts: Sequence[ScoredRollout], policy: TailoredPolicy) -> list[Floats]:
        """Take in a round that `policy` has just drawn.

        Args:
            rollouts: All with both log-probabilities over the whole vocabulary; may be none.
            policy: As it was when it drew them.

        Returns:
            For each rollout the log-probability of each output token among its choices, `[tokens]`.
        """
        ...

    def logprobs(self, output: PolicyOutput, rows: Sequence[int]) -> Tensor:
        """Those log-probabilities under the policy as it is now, `[B, T]`, 0 where padded; carries the gradient.

        Args:
            output: Of the B outputs.
            rows: Their numbers in the round.
        """
        ...

    def end_round(self) -> None:
        """The last step on the round has been taken."""
        ...

    def state(self) -> ObjectiveState:
        """For a checkpoint."""
        ...

    def load_state(self, state: ObjectiveState) -> None:
        """Go on from `state`. Raises `KeyError` or `ValueError` where it does not fit."""
        ...


class WholeVocabulary:
    """Every token may be chosen: the log-probabilities are the recorded ones and the policy's own."""

    token_mask = None

    def begin_round(self, rollouts: Sequence[ScoredRollout], policy: TailoredPolicy) -> list[Floats]:
        """See `ActionSpace`."""
        return [np.array(rollout.behaviour_logprobs, dtype=np.float64) for rollout in rollouts]

    def logprobs(self, output: PolicyOutput, rows: Sequence[int]) -> Tensor:
        """See `ActionSpace`."""
        return output.token_logprobs()[0]

    def end_round(self) -> None:
        """Nothing changes."""

    def state(self) -> ObjectiveState:
        """Nothing."""
        return ObjectiveState()

    def load_state(self, state: ObjectiveState) -> None:
        """Nothing."""
