"""PPO on the tailored policy: clipped ratios, a value model of its own, a KL penalty at each token.

PPO: Schulman et al., arXiv 1707.06347; for language models Ziegler et al., arXiv 1909.08593, and RL4LMs (Ramamurthy et
al., arXiv 2210.01241), whose NLPO is the same with fewer tokens to choose from (`nlpo.py`). A token is an action. Only
the adapter and the value model have gradients; the KL is to the frozen base. N = output tokens of some rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trimtab_training.objective_config import NlpoConfig, PpoConfig
from trimtab_training.objectives.action_space import ActionSpace
from trimtab_training.objectives.advantages import generalised_advantages, normalised, token_rewards
from trimtab_training.objectives.controllers import Coefficient
from trimtab_training.objectives.module_weights import load_weights, weights_of
from trimtab_training.objectives.objective import LossSum, ObjectiveState, ScoredRollout, TokenIds
from trimtab_training.objectives.round_buffer import RoundBuffer
from trimtab_training.objectives.sampled_logprobs import token_logprobs, with_logprobs
from trimtab_training.objectives.value_model import ValueModel
from trimtab_training.policy import TailoredPolicy
from trimtab_training.sampler import TokenMask

Floats = NDArray[np.float64]

_VALUE, _ACTIONS = "value.", "actions."
_KL_GAIN = 0.1
_ROWS_PER_FORWARD = 32


@dataclass(frozen=True, slots=True, eq=False)
class PpoRow:
    """A rollout of the round, by its number, with its advantages as they are normalised over its step's rows."""

    number: int
    advantages: Floats


class Ppo:
    """The objective; it learns from the newest round, `config.epochs` times.

    Args:
        config: Its coefficients.
        value_model: Trained along.
        actions: Among which tokens the policy chooses.
        prefix: What the adapter sees before every prompt.
        seed: Of the order of rows.
    """

    is_on_policy = True
    learns_from_base = False

    def __init__(
        self,
        config: PpoConfig | NlpoConfig,
        *,
        value_model: ValueModel,
        actions: ActionSpace,
        prefix: TokenIds,
        seed: int,
    ) -> None:
        self.name = config.kind
        self.prefix = prefix
        self.value_model = value_model
        self._config = config
        self._actions = actions
        # A round changes the coefficient by at most 2 %: the gain of 0.1 times an error of at most 0.2.
        self._kl_coef = Coefficient(config.kl_coef, config.kl_target, horizon=1 / _KL_GAIN)
        self._buffer = RoundBuffer(config.epochs, token_columns=("advantage", "return", "old_logprob"), seed=seed)

    @property
    def num_rollouts(self) -> int:
        """Rows of the newest round."""
        return len(self._buffer)

    @property
    def wants_round(self) -> bool:
        """Whether the round has been gone through as often as it is to be."""
        return self._buffer.is_used_up

    @property
    def token_mask(self) -> TokenMask | None:
        """What its action space draws under."""
        return self._actions.token_mask

    def add(self, rollouts: Sequence[ScoredRollout], policy: TailoredPolicy) -> Mapping[str, float]:
        """Replace the round: rewards, values and advantages are fixed until the next; then the KL weight adapts."""
        known = with_logprobs(rollouts, policy, self.prefix)
        current = token_logprobs(known, policy, self.prefix)  # the penalty is that of the policy that is trained
        log_ratios = [np.subtract(now, r.base_logprobs or ()) for now, r in zip(current, known, strict=True)]
        values = self._values(known)
        advantages = [
            generalised_advantages(
                token_rewards(r.reward, now.tolist(), r.base_logprobs or (), kl_coef=self._kl_coef.value),
                value,
                gamma=self._config.gamma,
                gae_lambda=self._config.gae_lambda,
            )
            for r, now, value in zip(known, current, values, strict=True)
        ]
        columns = {
            "advantage": advantages,
            "return": [advantage + value for advantage, value in zip(advantages, values, strict=True)],
            "old_logprob": self._actions.begin_round(known, policy),
        }
        self._buffer.replace(known, token_columns=columns)
        if not known:
            return {}
        kl_per_token = float(np.concatenate(log_ratios).mean())
        figures = {"kl_per_token": kl_per_token, "kl_coef": self._kl_coef.value}
        self._kl_coef.follow(kl_per_token, 1)
        return figures

    @torch.no_grad()
    def _values(self, rollouts: Sequence[ScoredRollout]) -> list[Floats]:
        values: list[Floats] = []
        for start in range(0, len(rollouts), _ROWS_PER_FORWARD):
            part = rollouts[start : start + _ROWS_PER_FORWARD]
            rows = self._read_values(part).double().cpu().numpy()
            values += [row[: len(r.output_token_ids)] for row, r in zip(rows, part, strict=True)]
        return values

    def _read_values(self, rollouts: Sequence[ScoredRollout]) -> Tensor:
        contexts = [(*self.prefix, *r.prompt_token_ids) for r in rollouts]
        return self.value_model.values(contexts, [r.output_token_ids for r in rollouts])

    def next_rows(self, num_rows: int) -> list[PpoRow]:
        """Rows of the round. Normalised here, before processes share them out: all of them see the same advantages."""
        numbers = self._buffer.draw(num_rows)
        advantages = normalised(self._buffer.token_column("advantage", numbers))
        return [PpoRow(number, row) for number, row in zip(numbers, advantages, strict=True)]

    def loss(self, policy: TailoredPolicy, rows: Sequence[PpoRow]) -> LossSum:
        """`ppo_loss`, summed over output tokens."""
        numbers = [row.number for row in rows]
        rollouts = [self._buffer.rollouts[number] for number in numbers]
        output = policy.forward(
            [r.prompt_token_ids for r in rollouts],
            [r.output_token_ids for r in rollouts],
            [self.prefix] * len(rollouts),
        )
        mask = output.mask
        with torch.set_grad_enabled(self._config.entropy_coef > 0):
            entropy = output.entropy()[mask]
        inputs = PpoInputs(
            logprobs=self._actions.logprobs(output, numbers)[mask],
            old_logprobs=_flat(self._buffer.token_column("old_logprob", numbers), mask.device),
            advantages=_flat([row.advantages for row in rows], mask.device),
            values=self._read_values(rollouts)[mask],
            returns=_flat(self._buffer.token_column("return", numbers), mask.device),
            entropy=entropy,
        )
        with torch.no_grad():
            kl = float(output.kl().sum())
        return ppo_loss(inputs, self._config, kl=kl)

    def after_step(self, figures: Mapping[str, float]) -> None:
        """After the last step on a round the action space may change."""
        if self._buffer.is_used_up:
            self._actions.end_round()

    def parameters(self) -> Sequence[torch.nn.Parameter]:
        """The value model's."""
        return [parameter for parameter in self.value_model.parameters() if parameter.requires_grad]

    def state(self) -> ObjectiveState:
        """The round, where in it the run is, the value model, the KL weight and the action space."""
        buffer, actions = self._buffer.state(), self._actions.state()
        return ObjectiveState(
            arrays={**buffer.arrays, **{f"{_ACTIONS}{name}": array for name, array in actions.arrays.items()}},
            values={**buffer.values, "kl_coef": self._kl_coef.value, "actions": dict(actions.values)},
            tensors={
                **weights_of(self.value_model, _VALUE),
                **{f"{_ACTIONS}{name}": tensor for name, tensor in actions.tensors.items()},
            },
        )

    def load_state(self, state: ObjectiveState) -> None:
        """See `Objective`."""
        self._buffer.load_state(state)
        load_weights(self.value_model, state.tensors, _VALUE)
        self._kl_coef.value = float(state.values["kl_coef"])
        self._actions.load_state(
            ObjectiveState(_of_actions(state.arrays), state.values["actions"], _of_actions(state.tensors))
        )

    def describe(self) -> dict[str, Any]:
        """The KL weight that the run has come to."""
        return {"kl_coef": self._kl_coef.value}


def _flat(rows: Sequence[Floats], device: torch.device) -> Tensor:
    """The tokens of some rows in the order in which indexing with their mask gives them, `[N]`."""
    return torch.as_tensor(np.concatenate(rows), dtype=torch.float32, device=device)


def _of_actions(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(_ACTIONS): value for name, value in found.items() if name.startswith(_ACTIONS)}


@dataclass(frozen=True, slots=True)
class PpoInputs:
    """What the loss is a function of; all `[N]`.

    Attributes:
        logprobs: Of the tokens under the policy as it is now; carries the adapter's gradient.
        old_logprobs: Under the policy that drew them.
        advantages: Normalised.
        values: The value model's; carries its gradient.
        returns: What it should have said.
        entropy: Of the policy as it is now, in nats; carries the adapter's gradient where its weight is not 0.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    values: Tensor
    returns: Tensor
    entropy: Tensor


def ppo_loss(inputs: PpoInputs, config: PpoConfig | NlpoConfig, *, kl: float) -> LossSum:
    """Sum over tokens of -min(ρA, clip(ρ, 1 ± clip)A) + value_coef (V - R)² - entropy_coef H.

    A ratio ρ beyond the clip moves the policy only where that brings it back.

    Args:
        inputs: Of N tokens.
        config: Clip and weights.
        kl: KL(tailored || base), summed over the tokens, for the figures.
    """
    ratios = (inputs.logprobs - inputs.old_logprobs).exp()
    clipped = ratios.clamp(1.0 - config.clip, 1.0 + config.clip)
    surrogate = torch.minimum(ratios * inputs.advantages, clipped * inputs.advantages).sum()
    value_error = (inputs.values - inputs.returns).square().sum()
    entropy = inputs.entropy.sum()
    total = -surrogate + config.value_coef * value_error - config.entropy_coef * entropy
    figures = {
        "policy_loss": -float(surrogate.detach()),
        "value_error": float(value_error.detach()),
        "entropy": float(entropy.detach()),
        "kl": kl,
        "ratio": float(ratios.detach().sum()),
        "clipped": float((ratios.detach() != clipped.detach()).sum()),
    }
    return LossSum(total, len(inputs.logprobs), figures)
