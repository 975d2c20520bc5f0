"""The objective that a configuration names."""

from typing import Any

from trimtab_training.models import AdapterStart
from trimtab_training.objective_config import ObjectiveConfig, QuarkConfig, RlooConfig, VbonConfig
from trimtab_training.objectives.objective import Objective
from trimtab_training.objectives.quark import Quark
from trimtab_training.objectives.rloo import Rloo


def build_objective(config: ObjectiveConfig, start: AdapterStart, *, seed: int) -> Objective[Any]:
    """Build it, without rollouts.

    Args:
        config: Which one, and its settings.
        start: The adapter to be trained, with the control tokens that Quark needs.
        seed: Of the order of rows.
    """
    if isinstance(config, QuarkConfig):
        return Quark(config, control_token_ids=start.control_token_ids, fixed_prefix=start.fixed_prefix, seed=seed)
    if isinstance(config, RlooConfig | VbonConfig):
        return Rloo(config, prefix=start.fixed_prefix, seed=seed)
    raise NotImplementedError(config.kind)
