"""Samples and rewards of logged rollouts: what was logged where it still holds, computed anew where it does not."""

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab_adapters.contract.records import Rollout
from trimtab_training.models import Vocabulary
from trimtab_training.prompts import prompt_text
from trimtab_training.rewards import Scorer
from trimtab_training.rollouts import Sample
from trimtab_training.sampling_settings import off_policy_reason


def samples_of(rollouts: Sequence[Rollout], vocabulary: Vocabulary, defaults: Mapping[str, Any]) -> list[Sample]:
    """The rollouts as samples; with log-probabilities only where these are of the distribution that was drawn from.

    Args:
        rollouts: With tokens.
        vocabulary: Decodes prompts that were sent as token ids.
        defaults: The base model's own sampling settings, see `model_defaults`.
    """
    return [_sample(rollout, vocabulary, off_policy_reason(rollout, defaults) is None) for rollout in rollouts]


def score_logged(rollouts: Sequence[Rollout], samples: Sequence[Sample], scorer: Scorer) -> list[float]:
    """The rewards of logged samples; one that was logged with the current version is not computed again."""
    if not samples:
        return []
    logged = [
        {value.version: value.raw for value in rollout.rewards if value.name == scorer.name} for rollout in rollouts
    ]
    # Only a reply says which version is current, so at least one output is scored.
    first = next((index for index, values in enumerate(logged) if not values), 0)
    version = scorer.score([samples[first].reward_input]).version
    missing = [index for index, values in enumerate(logged) if version not in values]
    if missing:
        reply = scorer.score([samples[index].reward_input for index in missing])
        for index, reward in zip(missing, reply.rewards, strict=True):
            logged[index][version] = reward
    return [values[version] for values in logged]


def _sample(rollout: Rollout, vocabulary: Vocabulary, has_logprobs: bool) -> Sample:
    return Sample(
        prompt_text(rollout, vocabulary),
        tuple(rollout.prompt_token_ids),
        rollout.output_text,
        tuple(rollout.output_token_ids),
        _of(rollout.steered_logprobs) if has_logprobs else None,
        _of(rollout.base_logprobs) if has_logprobs else None,
    )


def _of(values: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(values)
