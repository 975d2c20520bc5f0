"""The objective that a configuration names."""

from collections.abc import Collection
from typing import Any

from trimtab_training.models import AdapterStart, turn_off_dropout
from trimtab_training.objective_config import BonbonConfig, NlpoConfig, ObjectiveConfig, PpoConfig, QuarkConfig
from trimtab_training.objectives.action_space import ActionSpace, WholeVocabulary
from trimtab_training.objectives.bonbon import Bonbon
from trimtab_training.objectives.nlpo import MaskedVocabulary
from trimtab_training.objectives.objective import Objective
from trimtab_training.objectives.policy_mask import PolicyMask
from trimtab_training.objectives.ppo import Ppo
from trimtab_training.objectives.quark import Quark
from trimtab_training.objectives.rloo import Rloo
from trimtab_training.objectives.value_model import ValueModel


def build_objective(
    config: ObjectiveConfig, start: AdapterStart, *, end_token_ids: Collection[int], seed: int
) -> Objective[Any]:
    """Build it, without rollouts.

    Args:
        config: Which one, and its settings.
        start: The adapter to be trained, with the control tokens that Quark needs.
        end_token_ids: With which outputs end.
        seed: Of the order of rows.
    """
    if isinstance(config, QuarkConfig):
        return Quark(config, control_token_ids=start.control_token_ids, fixed_prefix=start.fixed_prefix, seed=seed)
    # All others compare probabilities, and are to see what learning has changed and not what was dropped out.
    turn_off_dropout(start.model)
    if isinstance(config, BonbonConfig):
        return Bonbon(config, prefix=start.fixed_prefix, seed=seed)
    if isinstance(config, PpoConfig | NlpoConfig):
        return _build_ppo(config, start, end_token_ids, seed)
    return Rloo(config, prefix=start.fixed_prefix, seed=seed)


def _build_ppo(config: PpoConfig | NlpoConfig, start: AdapterStart, end_token_ids: Collection[int], seed: int) -> Ppo:
    prefix = start.fixed_prefix
    actions: ActionSpace = WholeVocabulary()
    if isinstance(config, NlpoConfig):
        mask = PolicyMask(
            start.model,
            prefix=prefix,
            top_p=config.mask_top_p,
            min_tokens=config.mask_min_tokens,
            end_token_ids=end_token_ids,
        )
        actions = MaskedVocabulary(mask, start.model, prefix=prefix, interval=config.mask_interval)
    return Ppo(config, value_model=ValueModel(start.model), actions=actions, prefix=prefix, seed=seed)
