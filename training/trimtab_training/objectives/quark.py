"""Quark on the tailored policy: likelihood under quantile control, a KL penalty and an entropy bonus.

Quark: arXiv 2205.13636; on the tailored policy: IPA, arXiv 2305.15065. Every output that was ever scored stays in a
pool that is cut into reward quantiles; the adapter learns each quantile's outputs under a control token of its own and
serves under the best one. Letters: B = rows, T = output positions, V = vocabulary of the base model.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab_training.data_pool import DataPool, PoolItem, PoolRow
from trimtab_training.models import CONTROL_TOKENS_KEY
from trimtab_training.objective_config import QuarkConfig
from trimtab_training.objectives.controllers import Coefficient
from trimtab_training.objectives.objective import LossSum, ObjectiveState, ScoredRollout, TokenIds
from trimtab_training.policy import TailoredPolicy


class Quark:
    """The objective; its pool may grow at any time, and it never asks for more.

    Args:
        config: Coefficients and the number of quantiles.
        control_token_ids: One per quantile, best first.
        fixed_prefix: What the adapter sees after the control token.
        seed: Of the pool's shuffling.
    """

    name = "quark"
    is_on_policy = False
    learns_from_base = False
    wants_round = False
    token_mask = None

    def __init__(
        self, config: QuarkConfig, *, control_token_ids: Sequence[int], fixed_prefix: Sequence[int], seed: int
    ) -> None:
        if len(control_token_ids) != config.num_bins:
            raise ValueError(f"{len(control_token_ids)} control tokens for {config.num_bins} quantiles")
        self.pool = DataPool(config.num_bins, seed=seed)
        self.control_token_ids = tuple(control_token_ids)
        self._prefixes = [(token, *fixed_prefix) for token in control_token_ids]
        self._config = config
        self._kl_coef = Coefficient(config.kl_coef, config.kl_target, config.horizon)
        self._entropy_coef = Coefficient(config.entropy_coef, config.entropy_target, config.horizon, is_bonus=True)
        self._num_rows = 0

    @property
    def prefix(self) -> TokenIds:
        """The best quantile's control token and the fixed prefix."""
        return self._prefixes[0]

    @property
    def num_rollouts(self) -> int:
        """Size of the pool."""
        return len(self.pool)

    def add(self, rollouts: Sequence[ScoredRollout], policy: TailoredPolicy) -> Mapping[str, float]:
        """Add to the pool and cut its quantiles anew."""
        self.pool.add(PoolItem(r.prompt_token_ids, r.output_token_ids, r.reward) for r in rollouts)
        return {"pool_size": float(len(self.pool))}

    def next_rows(self, num_rows: int) -> list[PoolRow]:
        """The next rows of the shuffled pool."""
        rows = self.pool.draw(num_rows)
        self._num_rows = len(rows)
        return rows

    def loss(self, policy: TailoredPolicy, rows: Sequence[PoolRow]) -> LossSum:
        """`quark_loss` of the rows, per token."""
        output = policy.forward(
            [row.item.prompt_token_ids for row in rows],
            [row.item.output_token_ids for row in rows],
            [self._prefixes[row.bin] for row in rows],
        )
        result = quark_loss(
            QuarkInputs(output.steered_logits, output.base_logits, output.output_token_ids, output.mask),
            kl_coef=self._kl_coef.value,
            entropy_coef=self._entropy_coef.value,
        )
        num_tokens = int(output.mask.sum())
        figures = {"nll": result.nll, "kl": result.kl, "entropy": result.entropy}
        return LossSum(
            result.loss * num_tokens, num_tokens, {name: float(value) * num_tokens for name, value in figures.items()}
        )

    def after_step(self, figures: Mapping[str, float]) -> None:
        """Let the coefficients follow their targets."""
        self._kl_coef.follow(figures["kl"], self._num_rows)
        self._entropy_coef.follow(figures["entropy"], self._num_rows)

    def parameters(self) -> Sequence[torch.nn.Parameter]:
        """None besides the adapter's."""
        return ()

    def state(self) -> ObjectiveState:
        """Pool, its random state and the coefficients."""
        values = {
            "pool_rng": json.dumps(self.pool.rng_state()),
            "kl_coef": self._kl_coef.value,
            "entropy_coef": self._entropy_coef.value,
        }
        return ObjectiveState(arrays=self.pool.arrays(), values=values)

    def load_state(self, state: ObjectiveState) -> None:
        """See `Objective`."""
        self.pool = DataPool.restore(self._config.num_bins, dict(state.arrays), json.loads(state.values["pool_rng"]))
        self._kl_coef.value = float(state.values["kl_coef"])
        self._entropy_coef.value = float(state.values["entropy_coef"])

    def describe(self) -> dict[str, Any]:
        """The control tokens, which a run that goes on from the version uses again, and the pool's size."""
        return {CONTROL_TOKENS_KEY: list(self.control_token_ids), "pool_size": len(self.pool)}


@dataclass(frozen=True, slots=True)
class QuarkInputs:
    """What one batch's loss is a function of.

    Attributes:
        steered_logits: `[B, T, V]`, of the tailored policy at each output position, from `mixing.steer`; carries the
            adapter's gradient. Minus infinity where the base's is.
        base_logits: `[B, T, V]`, of the frozen base at the same positions, without gradient.
        output_token_ids: `[B, T]`, the tokens to make likelier; any valid id where `mask` is False.
        mask: `[B, T]`, True at real output tokens; at least one is.
    """

    steered_logits: Tensor
    base_logits: Tensor
    output_token_ids: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True)
class QuarkLoss:
    """Scalars, means over all True positions of the batch; only `loss` carries a gradient.

    Attributes:
        loss: `nll + kl_coef * kl - entropy_coef * entropy`.
        nll: Negative log-likelihood of the outputs under the tailored policy, nats per token.
        kl: KL(tailored || base), nats per token.
        entropy: Entropy of the tailored policy, nats per token.
    """

    loss: Tensor
    nll: Tensor
    kl: Tensor
    entropy: Tensor


def quark_loss(inputs: QuarkInputs, *, kl_coef: float, entropy_coef: float) -> QuarkLoss:
    """Quark's loss of one batch.

    The gradient reaches the adapter through the combined softmax: for the likelihood term and an adapter logit z_k it
    is alpha * (pi(k) - 1[k = y]), whether or not the adapter's logits are normalised first, because normalising
    subtracts the same number from every token's steered logit.
    """
    steered_logits = inputs.steered_logits[inputs.mask]
    base_logits = inputs.base_logits[inputs.mask]
    targets = inputs.output_token_ids[inputs.mask]
    if not targets.numel():
        raise ValueError("a batch without output tokens has no loss")
    steered = torch.log_softmax(steered_logits.float(), dim=-1)
    base = torch.log_softmax(base_logits.float(), dim=-1)
    nll = -steered.gather(-1, targets[:, None]).mean()

    probabilities = steered.exp()
    # A token that the base forbids has probability 0 in both; 0 * (-inf) must count as 0, in value and in gradient.
    impossible = torch.isneginf(steered)
    entropy = -(probabilities * steered.masked_fill(impossible, 0.0)).sum(dim=-1).mean()
    cross_entropy = -(probabilities * base.masked_fill(impossible, 0.0)).sum(dim=-1).mean()
    kl = cross_entropy - entropy
    loss = nll + kl_coef * kl - entropy_coef * entropy
    return QuarkLoss(loss=loss, nll=nll.detach(), kl=kl.detach(), entropy=entropy.detach())
