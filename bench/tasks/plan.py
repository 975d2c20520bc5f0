"""How much of everything a run spends, and the settings of its training; one tree, overridden on the command line."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal

from tasks.language_models import ExpertRecipe


@dataclass(frozen=True, slots=True)
class Plan:
    """Settings of a run. IPA and fine-tuning share all of them but the learning rate.

    Attributes:
        num_prompts: Held-out prompts that are measured.
        num_samples: Outputs per prompt and seed; best-of-N chooses among all of them.
        train_prompts: Most prompts that are trained on.
        steps: Optimiser steps.
        objective: Section `objective` of the training configuration.
        transform: Section `reward.transform`.
        batch_size: Rollouts per step.
        prompts_per_round: Prompts of a round of rollouts.
        num_per_prompt: Rollouts per prompt of a round.
        interval: Steps between two rounds, for objectives with a pool.
        base_dtype: Precision of the frozen base, in training and when drawing. bfloat16 takes several times as long on
            a CPU that has no instructions for it.
        alpha: Weight of the adapter LM.
        start_scale: Of the adapter LM's logits at the start.
        lr: Peak learning rate of the adapter LM, of 0.001 and 0.003 the better one on four of five tasks.
        fine_tuning_lr: Of the base itself.
        expert_alpha: Weight of the pair of experts.
        expert: How the experts are made.
    """

    num_prompts: int = 400
    num_samples: int = 8
    train_prompts: int = 1500
    steps: int = 800
    objective: dict[str, Any] = field(default_factory=lambda: {"kind": "rloo", "kl_coef": 0.02})
    transform: dict[str, Any] = field(default_factory=lambda: {"kind": "raw"})
    batch_size: int = 64
    prompts_per_round: int = 64
    num_per_prompt: int = 4
    interval: int = 50
    base_dtype: Literal["float32", "bfloat16"] = "float32"
    alpha: float = 1.0
    start_scale: float = 0.1
    lr: float = 3e-3
    fine_tuning_lr: float = 2e-4
    expert_alpha: float = 1.0
    expert: ExpertRecipe = field(default_factory=ExpertRecipe)

    def described(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


_QUICK: Final[dict[str, Any]] = {"num_prompts": 100, "steps": 40}

_OF_TASK: Final[dict[str, dict[str, Any]]] = {
    "toxicity": {"objective": {"kind": "rloo", "kl_coef": 0.03}},
    "keywords": {"objective": {"kind": "rloo", "kl_coef": 0.01}},
    "open-ended": {},
    "dialogue-safety": {"objective": {"kind": "rloo", "kl_coef": 0.1}},  # at 0.02 outputs become few and alike
    "grounded": {"objective": {"kind": "rloo", "kl_coef": 0.1}},  # log-odds: several times as wide as a probability
}

TASKS: Final = tuple(_OF_TASK)


def plan_for(task: str, *, quick: bool, overrides: dict[str, Any]) -> Plan:
    """The plan of a task; `overrides` replace single settings, and an unknown one is an error."""
    settings = {**_OF_TASK[task], **(_QUICK if quick else {}), **overrides}
    if isinstance(settings.get("expert"), dict):
        settings["expert"] = ExpertRecipe(**settings["expert"])
    return replace(Plan(), **settings)
