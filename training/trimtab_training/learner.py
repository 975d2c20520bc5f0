"""One optimiser step after another on what an objective hands out."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol

import torch
from typing_extensions import TypeVar

from trimtab_adapters.contract.errors import WeightsError
from trimtab_training.config import OptimiserConfig
from trimtab_training.objectives.objective import LossSum, Objective, ScoredRollout
from trimtab_training.padding import TokenIds
from trimtab_training.policy import TailoredPolicy
from trimtab_training.processes import Processes, SingleProcess


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """What one step reports; logarithms are natural.

    Attributes:
        loss: What was minimised.
        figures: The objective's own, means over what its loss is a mean of: Quark's `nll`, `kl` and `entropy`.
        grad_norm: Norm of the gradient before clipping.
        lr: Learning rate of the step.
        num_units: What the loss is a mean over, tokens or outputs.
    """

    loss: float
    figures: Mapping[str, float]
    grad_norm: float
    lr: float
    num_units: int

    def flat(self) -> dict[str, float]:
        """All of them by name."""
        return {
            "loss": self.loss,
            **self.figures,
            "grad_norm": self.grad_norm,
            "lr": self.lr,
            "num_units": float(self.num_units),
        }


def learning_rate(config: OptimiserConfig, step: int, num_steps: int) -> float:
    """Learning rate of step 0..num_steps-1: linear warm-up, then linear decay that would reach 0 at `num_steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.decay == "none":
        return config.lr
    return config.lr * (num_steps - step) / max(1, num_steps - config.warmup_steps)


class Trainee(Protocol):
    """What is trained: a tailored policy, or a model in its place."""

    adapter: Any

    @property
    def device(self) -> torch.device:
        """Where it is."""
        ...

    def can_read(self, prompt_token_ids: TokenIds, output_token_ids: TokenIds, adapter_prefix: TokenIds) -> bool:
        """Whether a row can be learned from."""
        ...


Policy = TypeVar("Policy", bound=Trainee, default=TailoredPolicy)


class Learner(Generic[Policy]):
    """The trainable state of a run: adapter, objective, optimiser and number of steps taken.

    A step's gradient is that of the mean over all units of its rows, however the rows are cut into micro-batches and
    shared among processes.

    Args:
        policy: What has gradients in its adapter is trained; as it comes when nothing has been frozen.
        objective: What is minimised.
        optimiser: Learning rate and batch sizes.
        num_steps: Steps of the whole run, for the decay of the learning rate.
        processes: Those that take each step together.
    """

    def __init__(
        self,
        policy: Policy,
        objective: Objective[Any, Policy],
        *,
        optimiser: OptimiserConfig,
        num_steps: int,
        processes: Processes | None = None,
    ) -> None:
        self.policy = policy
        self.objective = objective
        self.step = 0
        self.num_steps = num_steps
        self._config = optimiser
        self._processes = processes or SingleProcess()
        self._parameters = [p for p in policy.adapter.parameters() if p.requires_grad] + list(objective.parameters())
        self.optimiser = torch.optim.Adam(self._parameters, lr=optimiser.lr, eps=optimiser.eps)

    def add_rollouts(self, rollouts: Sequence[ScoredRollout]) -> dict[str, float]:
        """Give scored rollouts to the objective; returns its figures and `num_unreadable`.

        What the models cannot read (`TailoredPolicy.can_read`) is left out and counted.
        """
        prefix = self.objective.prefix
        readable = [r for r in rollouts if self.policy.can_read(r.prompt_token_ids, r.output_token_ids, prefix)]
        figures = self.objective.add(readable, self.policy)
        return {**figures, "num_unreadable": float(len(rollouts) - len(readable))}

    def train_step(self) -> StepMetrics:
        """Take one optimiser step over `batch_size * grad_accumulation` rows of the objective.

        Raises:
            WeightsError: The loss or its gradient is NaN or infinite; the step is not taken.
        """
        self.policy.adapter.train()
        lr = learning_rate(self._config, self.step, self.num_steps)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.optimiser.zero_grad(set_to_none=True)
        rows = self.objective.next_rows(self._config.batch_size * self._config.grad_accumulation)
        loss, num_units, figures = self._add_up_gradients(rows)
        grad_norm = self._clip()
        _refuse_divergence(loss, grad_norm, self.step)
        self.optimiser.step()
        self.step += 1
        self.objective.after_step(figures)
        return StepMetrics(loss, figures, grad_norm, lr, num_units)

    def _add_up_gradients(self, rows: Sequence[Any]) -> tuple[float, int, dict[str, float]]:
        """Leave the gradient of the mean loss in the parameters; returns loss, number of units and mean figures."""
        mine = rows[self._processes.rank :: self._processes.num]
        sums: Counter[str] = Counter()
        for start in range(0, len(mine), self._config.batch_size):
            part = self.objective.loss(self.policy, mine[start : start + self._config.batch_size])
            part.total.backward()  # type: ignore[no-untyped-call]
            _add(sums, part)
        totals = self._processes.add_up(dict(sums))
        num_units = totals.pop("num_units")
        gradients = [self._gradient(parameter) for parameter in self._parameters]
        self._processes.add_up_tensors(gradients)
        for gradient in gradients:
            gradient.div_(num_units)
        loss = totals.pop("loss") / num_units
        return loss, int(num_units), {name: total / num_units for name, total in totals.items()}

    def _gradient(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        if parameter.grad is None:  # a process without rows has none, but takes part in the sum
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad

    def _clip(self) -> float:
        limit = self._config.max_grad_norm
        return float(torch.nn.utils.clip_grad_norm_(self._parameters, limit if limit is not None else float("inf")))

    def state(self) -> dict[str, Any]:
        """Optimiser state for a checkpoint; the other parts are saved in formats of their own."""
        return dict(self.optimiser.state_dict())

    def load_state(self, state: dict[str, Any], step: int) -> None:
        """Go on from `state` after `step` steps; the adapter's weights must already be those of that time."""
        self.optimiser.load_state_dict(state)
        self.step = step


def _add(sums: Counter[str], part: LossSum) -> None:
    total = float(part.total.detach())
    for name, value in {"loss": total, "num_units": part.num_units, **part.figures}.items():
        sums[name] += value  # type: ignore[assignment]


def _refuse_divergence(loss: float, grad_norm: float, step: int) -> None:
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise WeightsError(
            f"training diverged at step {step}: loss {loss}, gradient norm {grad_norm}; the weights are those of the "
            "step before; lower optimiser.lr or set optimiser.max_grad_norm"
        )
