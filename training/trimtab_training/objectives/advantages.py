"""From one reward per output to one advantage per token: KL penalty, generalised advantages, normalisation.

Ziegler et al. (arXiv 1909.08593) for the penalty, Schulman et al. (arXiv 1506.02438) for the advantages. Plain numpy;
T = tokens of one output. An output is an episode: it ends with its last token, and nothing is worth anything after it,
also where the limit on its length ended it, because the reward judges what is there.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_SMALLEST_DEVIATION = 1e-8


def token_rewards(
    reward: float, logprobs: Sequence[float], base_logprobs: Sequence[float], *, kl_coef: float
) -> Floats:
    """-kl_coef * (log π - log base) of each token, and the reward on top of the last, `[T]`.

    Args:
        reward: Of the whole output.
        logprobs: `[T]`, under the policy that drew it.
        base_logprobs: `[T]`.
        kl_coef: Reward per nat.
    """
    rewards = -kl_coef * (np.asarray(logprobs, dtype=np.float64) - np.asarray(base_logprobs, dtype=np.float64))
    rewards[-1] += reward
    return rewards


def generalised_advantages(rewards: Floats, values: Floats, *, gamma: float, gae_lambda: float) -> Floats:
    """A_t = sum over k of (γλ)^k δ_{t+k} with δ_t = r_t + γ V_{t+1} - V_t, `[T]`; V behind the last token is 0.

    `advantages + values` are the returns that the value model learns.

    Args:
        rewards: `[T]`.
        values: `[T]`, of the state in which each token was chosen.
        gamma: Discount per token.
        gae_lambda: 0 looks one token ahead, 1 to the end.
    """
    advantages = np.empty_like(rewards)
    advantage = next_value = 0.0
    for t in range(len(rewards) - 1, -1, -1):
        error = rewards[t] + gamma * next_value - values[t]
        advantage = error + gamma * gae_lambda * advantage
        advantages[t] = advantage
        next_value = values[t]
    return advantages


def normalised(advantages: Sequence[Floats]) -> list[Floats]:
    """Shifted and scaled to mean 0 and standard deviation 1 over all tokens of all rows together.

    Advantages that are all the same say nothing about any token and become 0.
    """
    tokens = np.concatenate(advantages) if advantages else np.empty(0)
    if not len(tokens):
        return list(advantages)
    mean, deviation = tokens.mean(), tokens.std()
    return [(row - mean) / (deviation + _SMALLEST_DEVIATION) for row in advantages]
