"""Log-probabilities of sampled tokens: those that the engine recorded, computed anew where it did not."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

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
    for index, (steered, base) in zip(missing, _forward([rollouts[i] for i in missing], policy, prefix), strict=True):
        complete[index] = replace(
            rollouts[index],
            behaviour_logprobs=rollouts[index].behaviour_logprobs or steered,
            base_logprobs=rollouts[index].base_logprobs or base,
        )
    return complete


def output_logprobs(rollouts: Sequence[ScoredRollout], policy: TailoredPolicy, prefix: TokenIds) -> NDArray[np.float64]:
    """log π(y|x) of each whole output under the policy as it is now, `[outputs]`.

    What has just been drawn has its behaviour's, which is the same; only others cost a forward pass.

    Args:
        rollouts: With behaviour log-probabilities.
        policy: The policy.
        prefix: What the adapter sees before every prompt.
    """
    return np.array([row.sum() for row in token_logprobs(rollouts, policy, prefix)], dtype=np.float64)


def token_logprobs(
    rollouts: Sequence[ScoredRollout], policy: TailoredPolicy, prefix: TokenIds
) -> list[NDArray[np.float64]]:
    """log π of each output token under the policy as it is now, `[tokens]` for each output; see `output_logprobs`."""
    found = [np.array(r.behaviour_logprobs or (), dtype=np.float64) for r in rollouts]
    others = [i for i, rollout in enumerate(rollouts) if not rollout.is_current]
    for index, (steered, _) in zip(others, _forward([rollouts[i] for i in others], policy, prefix), strict=True):
        found[index] = np.array(steered, dtype=np.float64)
    return found


def _forward(
    rollouts: Sequence[ScoredRollout], policy: TailoredPolicy, prefix: TokenIds
) -> Iterator[tuple[tuple[float, ...], tuple[float, ...]]]:
    """Steered and base log-probabilities of each rollout's tokens, some rollouts at a time."""
    with evaluating(policy.adapter):
        for start in range(0, len(rollouts), _ROWS_PER_FORWARD):
            part = rollouts[start : start + _ROWS_PER_FORWARD]
            output = policy.forward(
                [r.prompt_token_ids for r in part], [r.output_token_ids for r in part], [prefix] * len(part)
            )
            steered, base = (logprobs.tolist() for logprobs in output.token_logprobs())
            for row, rollout in enumerate(part):
                length = len(rollout.output_token_ids)
                yield tuple(steered[row][:length]), tuple(base[row][:length])
