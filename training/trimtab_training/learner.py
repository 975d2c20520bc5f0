"""One optimiser step after another: Quark on batches of the pool."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trimtab_adapters.contract.errors import WeightsError
from trimtab_training.config import OptimiserConfig, QuarkConfig
from trimtab_training.data_pool import DataPool, PoolItem
from trimtab_training.objectives.quark import QuarkInputs, quark_loss
from trimtab_training.policy import TailoredPolicy
from trimtab_training.rollouts import Sample

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """Means over the tokens of one step; logarithms are natural.

    Attributes:
        loss: What was minimised.
        nll: Negative log-likelihood per token under the tailored policy.
        kl: KL(tailored || base) per token.
        entropy: Entropy of the tailored policy per token.
        grad_norm: Norm of the adapter's gradient before clipping.
        lr: Learning rate of the step.
        num_tokens: Output tokens in the step.
    """

    loss: float
    nll: float
    kl: float
    entropy: float
    grad_norm: float
    lr: float
    num_tokens: int


def learning_rate(config: OptimiserConfig, step: int, num_steps: int) -> float:
    """Learning rate of step 0..num_steps-1: linear warm-up, then linear decay that would reach 0 at `num_steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.decay == "none":
        return config.lr
    return config.lr * (num_steps - step) / max(1, num_steps - config.warmup_steps)


class Learner:
    """The trainable state of a run: adapter, optimiser, pool and number of steps taken.

    Args:
        policy: Its adapter is trained; everything in the adapter has gradients.
        pool: Drawn from; may grow between steps.
        control_token_ids: One per quantile, best first.
        fixed_prefix: What the adapter sees after the control token.
        quark: Coefficients.
        optimiser: Learning rate and batch sizes.
        num_steps: Steps of the whole run, for the decay of the learning rate.
    """

    def __init__(
        self,
        policy: TailoredPolicy,
        pool: DataPool,
        *,
        control_token_ids: tuple[int, ...],
        fixed_prefix: tuple[int, ...],
        quark: QuarkConfig,
        optimiser: OptimiserConfig,
        num_steps: int,
    ) -> None:
        if len(control_token_ids) != pool.num_bins:
            raise ValueError(f"{len(control_token_ids)} control tokens for {pool.num_bins} quantiles")
        self.policy = policy
        self.pool = pool
        self.step = 0
        self.num_steps = num_steps
        self.control_token_ids = control_token_ids
        self._prefixes = [(token, *fixed_prefix) for token in control_token_ids]
        self._quark = quark
        self._config = optimiser
        policy.adapter.requires_grad_(True)
        self.optimiser = torch.optim.Adam(policy.adapter.parameters(), lr=optimiser.lr, eps=optimiser.eps)

    @property
    def best_prefix(self) -> tuple[int, ...]:
        """What the adapter sees before a prompt when it is to be good: the best quantile's control token first."""
        return self._prefixes[0]

    def add_rollouts(self, samples: Sequence[Sample], rewards: Sequence[float]) -> None:
        """Add scored rollouts to the pool and cut its quantiles anew.

        What the models cannot read (`TailoredPolicy.can_read`) is left out.
        """
        items = [
            PoolItem(sample.prompt_token_ids, sample.output_token_ids, reward)
            for sample, reward in zip(samples, rewards, strict=True)
            if self.policy.can_read(sample.prompt_token_ids, sample.output_token_ids, self.best_prefix)
        ]
        if len(items) < len(samples):
            num_unusable = len(samples) - len(items)
            logger.warning("%d of %d rollouts are empty, too long or hold unknown tokens", num_unusable, len(samples))
        self.pool.add(items)

    def train_step(self) -> StepMetrics:
        """Take one optimiser step over `grad_accumulation` batches of the pool.

        Raises:
            WeightsError: The loss or its gradient is NaN or infinite; the step is not taken.
        """
        adapter = self.policy.adapter
        adapter.train()
        lr = learning_rate(self._config, self.step, self.num_steps)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.optimiser.zero_grad(set_to_none=True)
        sums = torch.zeros(4, dtype=torch.float64)
        num_tokens = 0
        for _ in range(self._config.grad_accumulation):
            batch = self.pool.draw(self._config.batch_size)
            output = self.policy.forward(
                batch.prompt_token_ids, batch.output_token_ids, [self._prefixes[b] for b in batch.bins]
            )
            result = quark_loss(
                QuarkInputs(output.steered_logits, output.base_logits, output.output_token_ids, output.mask),
                kl_coef=self._quark.kl_coef,
                entropy_coef=self._quark.entropy_coef,
            )
            (result.loss / self._config.grad_accumulation).backward()  # type: ignore[no-untyped-call]
            sums += torch.stack((result.loss.detach(), result.nll, result.kl, result.entropy)).double().cpu()
            num_tokens += int(output.mask.sum())
        limit = self._config.max_grad_norm
        grad_norm = torch.nn.utils.clip_grad_norm_(adapter.parameters(), limit if limit is not None else float("inf"))
        loss, nll, kl, entropy = (sums / self._config.grad_accumulation).tolist()
        _refuse_divergence(loss, float(grad_norm), self.step)
        self.optimiser.step()
        self.step += 1
        return StepMetrics(loss, nll, kl, entropy, float(grad_norm), lr, num_tokens)

    def state(self) -> dict[str, Any]:
        """Optimiser state for a checkpoint; the other parts are saved in formats of their own."""
        return dict(self.optimiser.state_dict())

    def load_state(self, state: dict[str, Any], step: int) -> None:
        """Go on from `state` after `step` steps; the adapter's weights must already be those of that time."""
        self.optimiser.load_state_dict(state)
        self.step = step


def _refuse_divergence(loss: float, grad_norm: float, step: int) -> None:
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise WeightsError(
            f"training diverged at step {step}: loss {loss}, gradient norm {grad_norm}; the weights are those of the "
            "step before; lower optimiser.lr or set optimiser.max_grad_norm"
        )
