"""REINFORCE with a leave-one-out baseline on the tailored policy.

RLOO: Ahmadian et al., arXiv 2402.14740. An output is one action: its return is the reward less the KL penalty, its
baseline the mean return of the other outputs for the same prompt. vBoN (arXiv 2407.06057) is the same with the reward
log C, the logarithm of the calibrated reward, and a KL weight of 1 / (n - 1), under which best-of-n is optimal.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trimtab_training.objective_config import RlooConfig, VbonConfig
from trimtab_training.objectives.objective import LossSum, ObjectiveState, ScoredRollout, TokenIds
from trimtab_training.objectives.round_buffer import RoundBuffer
from trimtab_training.objectives.sampled_logprobs import output_logprobs, with_logprobs
from trimtab_training.policy import TailoredPolicy


class Rloo:
    """The objective; it learns from the newest round, `config.epochs` times.

    Args:
        config: Its coefficients.
        prefix: What the adapter sees before every prompt.
        seed: Of the order of rows.
    """

    is_on_policy = True
    learns_from_base = False
    token_mask = None

    def __init__(self, config: RlooConfig | VbonConfig, *, prefix: TokenIds, seed: int) -> None:
        self.name = config.kind
        self.prefix = prefix
        self._config = config
        self._buffer = RoundBuffer(config.epochs, columns=("advantage",), seed=seed)

    @property
    def num_rollouts(self) -> int:
        """Rows of the newest round."""
        return len(self._buffer)

    @property
    def wants_round(self) -> bool:
        """Whether the round has been gone through as often as it is to be."""
        return self._buffer.is_used_up

    def add(self, rollouts: Sequence[ScoredRollout], policy: TailoredPolicy) -> Mapping[str, float]:
        """Replace the round. Prompts with a single readable output have no baseline and are left out."""
        known = with_logprobs(rollouts, policy, self.prefix)
        rewards = np.array([r.reward for r in known])
        # The penalty is of the policy that is trained, also where another one drew the output.
        kl = output_logprobs(known, policy, self.prefix) - np.array([sum(r.base_logprobs or ()) for r in known])
        groups = np.array([r.group for r in known], dtype=np.int64)
        advantages = leave_one_out(rewards - self._config.kl_coef * kl, groups)
        usable = np.isfinite(advantages)
        self._buffer.replace(
            [rollout for rollout, is_usable in zip(known, usable, strict=True) if is_usable],
            {"advantage": advantages[usable]},
        )
        return {"kl_per_output": float(kl.mean()) if len(kl) else 0.0, "num_without_baseline": float((~usable).sum())}

    def next_rows(self, num_rows: int) -> Sequence[int]:
        """Numbers of rows of the round."""
        return self._buffer.draw(num_rows)

    def loss(self, policy: TailoredPolicy, rows: Sequence[int]) -> LossSum:
        """-min(ρ, max_ratio) A log π(y|x), summed over outputs; ρ carries no gradient.

        ρ = π(y|x) / behaviour(y|x) is 1 when an output is read for the first time right after it was drawn.
        """
        rollouts = [self._buffer.rollouts[row] for row in rows]
        output = policy.forward(
            [r.prompt_token_ids for r in rollouts],
            [r.output_token_ids for r in rollouts],
            [self.prefix] * len(rollouts),
        )
        steered, base = output.token_logprobs()
        logprobs = steered.sum(dim=-1)
        behaviour = torch.tensor([sum(r.behaviour_logprobs or ()) for r in rollouts], device=logprobs.device)
        advantages = torch.tensor(self._buffer.column("advantage")[list(rows)], device=logprobs.device).float()
        ratios = (logprobs.detach() - behaviour).exp()
        loss = -(ratios.clamp(max=self._config.max_ratio) * advantages * logprobs).sum()
        figures = {
            "kl": float((logprobs.detach() - base.sum(dim=-1)).sum()),
            "ratio": float(ratios.sum()),
            "num_tokens": float(output.mask.sum()),
        }
        return LossSum(loss, len(rows), figures)

    def after_step(self, figures: Mapping[str, float]) -> None:
        """Nothing adapts."""

    def parameters(self) -> Sequence[torch.nn.Parameter]:
        """None besides the adapter's."""
        return ()

    def state(self) -> ObjectiveState:
        """The round and where in it the run is."""
        return self._buffer.state()

    def load_state(self, state: ObjectiveState) -> None:
        """See `Objective`."""
        self._buffer.load_state(state)

    def describe(self) -> dict[str, Any]:
        """Nothing that a later run needs."""
        return {}


def leave_one_out(returns: NDArray[np.float64], groups: NDArray[np.int64]) -> NDArray[np.float64]:
    """Each return less the mean of the others of its group, `[outputs]` -> `[outputs]`; NaN for a group of one."""
    _, which = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(which, weights=returns), np.bincount(which)
    with np.errstate(invalid="ignore", divide="ignore"):
        others = (sums[which] - returns) / (counts[which] - 1)
    return returns - others
