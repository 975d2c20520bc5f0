"""What an objective of a training run is: it takes in scored rollouts, hands out rows, and says what a row costs.

The learner owns the adapter, the optimiser and the processes; an objective owns everything that its method needs
besides: a pool or a buffer, control tokens, advantages, a value model, adaptive coefficients.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import TypeVar

from trimtab_training.policy import TailoredPolicy
from trimtab_training.sampler import TokenMask

TokenIds = tuple[int, ...]
Row = TypeVar("Row")
Policy = TypeVar("Policy", contravariant=True, default=TailoredPolicy)


@dataclass(frozen=True, slots=True)
class ScoredRollout:
    """One output of a policy with what it earned.

    Attributes:
        prompt_token_ids: At least one id.
        output_token_ids: At least one id.
        reward: What the objective is to raise: the reward itself, or its transform. Finite.
        group: Rollouts of one prompt and one round have the same number.
        behaviour_logprobs: Log-probability of each output token under the policy that drew it, before temperature;
            None where nobody recorded it.
        base_logprobs: Likewise under the base.
        is_current: Whether the policy as it is now drew it, as it did a fresh round; of the log nobody can say so.
    """

    prompt_token_ids: TokenIds
    output_token_ids: TokenIds
    reward: float
    group: int
    behaviour_logprobs: tuple[float, ...] | None = None
    base_logprobs: tuple[float, ...] | None = None
    is_current: bool = True


@dataclass(frozen=True, slots=True)
class LossSum:
    """A loss as a sum over units, so that parts of a batch can be added up, over processes too.

    Attributes:
        total: Scalar with the gradient: the loss is `total / num_units` once both are complete.
        num_units: Tokens or outputs, whatever the loss is a mean of.
        figures: Sums over the same units of what is reported; without gradients.
    """

    total: Tensor
    num_units: float
    figures: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class ObjectiveState:
    """What a checkpoint keeps of an objective.

    Attributes:
        arrays: Plain numpy arrays by name.
        values: JSON-able values by name.
        tensors: Weights by name.
    """

    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(Protocol[Row, Policy]):
    """A method of training an adapter LM, or another model in its place."""

    @property
    def name(self) -> str:
        """As in a configuration: `quark`, `ppo`."""
        ...

    @property
    def prefix(self) -> TokenIds:
        """What the adapter sees before a prompt when it samples and serves."""
        ...

    @property
    def num_rollouts(self) -> int:
        """Scored rollouts that rows can be drawn from now."""
        ...

    @property
    def is_on_policy(self) -> bool:
        """Whether it learns from the newest round alone, which the current policy has to draw."""
        ...

    @property
    def learns_from_base(self) -> bool:
        """Whether the base alone draws all of its rounds, whatever the adapter has learned."""
        ...

    @property
    def token_mask(self) -> TokenMask | None:
        """What its rounds are drawn under, and the evaluation is not; None where every token may be drawn."""
        ...

    @property
    def wants_round(self) -> bool:
        """Whether it has used up what it had; pools never do."""
        ...

    def add(self, rollouts: Sequence[ScoredRollout], policy: Policy) -> Mapping[str, float]:
        """Take in a round or the log; returns figures about it for the metrics.

        What the models cannot read (`TailoredPolicy.can_read`) has been left out before.
        """
        ...

    def next_rows(self, num_rows: int) -> Sequence[Row]:
        """Rows of the next step; the same in every process. At most `num_rows`."""
        ...

    def loss(self, policy: Policy, rows: Sequence[Row]) -> LossSum:
        """The loss of some of these rows, at least one."""
        ...

    def after_step(self, figures: Mapping[str, float]) -> None:
        """Adapt coefficients to the means of a step that has been taken."""
        ...

    def parameters(self) -> Sequence[torch.nn.Parameter]:
        """Trained besides the adapter's own, such as a value model's."""
        ...

    def state(self) -> ObjectiveState:
        """For a checkpoint."""
        ...

    def load_state(self, state: ObjectiveState) -> None:
        """Go on from `state`, as if nothing had happened. Raises `KeyError` or `ValueError` where it does not fit."""
        ...

    def describe(self) -> dict[str, Any]:
        """For the manifest: what a later run needs to know, and what a person wants to."""
        ...
