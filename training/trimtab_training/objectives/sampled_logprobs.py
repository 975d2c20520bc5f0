"""Log-probabilities of sampled tokens: those that the engine recorded, computed anew where it did not."""

from collections.abc import Sequence
from dataclasses import replace

from trimtab_training.objectives.objective import ScoredRollout, TokenIds
from trimtab_training.policy import TailoredPolicy, evaluating

_ROWS_PER_FORWARD = 32


def with_logprobs(rollouts: Sequence[ScoredRollout], policy: TailoredPolicy, prefix: TokenIds) -> list[ScoredRollout]:
    """The rollouts, each with behaviour and base log-probabilities.

    Recorded ones are kept: they need no forward pass of the base. Where they are missing the policy as it is now is
    taken to have drawn the rollout, which is true of a round that has just been drawn.
    """
    missing = [i for i, r in enumerate(rollouts) if r.behaviour_logprobs is None or r.base_logprobs is None]
    complete = list(rollouts)
    with evaluating(policy.adapter):
        for start in range(0, len(missing), _ROWS_PER_FORWARD):
            part = missing[start : start + _ROWS_PER_FORWARD]
            output = policy.forward(
                [rollouts[i].prompt_token_ids for i in part],
                [rollouts[i].output_token_ids for i in part],
                [prefix] * len(part),
            )
            steered, base = (logprobs.tolist() for logprobs in output.token_logprobs())
            for row, index in enumerate(part):
                rollout = rollouts[index]
                length = len(rollout.output_token_ids)
                complete[index] = replace(
                    rollout,
                    behaviour_logprobs=rollout.behaviour_logprobs or tuple(steered[row][:length]),
                    base_logprobs=rollout.base_logprobs or tuple(base[row][:length]),
                )
    return complete
