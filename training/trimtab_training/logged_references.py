"""Logged outputs of the base that can stand for reference rollouts that a run would otherwise draw."""

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab_adapters.contract.records import Rollout
from trimtab_adapters.contract.reference_policy import ENDPOINT, IDENTITY
from trimtab_adapters.contract.rollout_filter import RolloutFilter
from trimtab_training.config import SamplingConfig, TrainConfig
from trimtab_training.gateway import GatewayClient
from trimtab_training.logged_rewards import samples_of, score_logged
from trimtab_training.logged_rollouts import RolloutSieve, requests_of, same_draw
from trimtab_training.models import Vocabulary
from trimtab_training.prompts import Prompt
from trimtab_training.rewards import Scorer
from trimtab_training.sampling_settings import is_drawn_like, is_fair_sample, model_defaults

ENDPOINTS = ("completions", "reference")


def logged_reference_scores(
    config: TrainConfig,
    gateway: GatewayClient | None,
    prompts: Sequence[Prompt],
    vocabulary: Vocabulary,
    scorer: Scorer,
) -> dict[str, list[float]]:
    """Rewards of what the log has of reference rollouts for these prompts, by prompt text.

    Nothing where the gateway does not draw the others. A rollout that is also learned from is ranked among K that hold
    itself, which moves its rank towards 1/2 by the share 1/K.
    """
    if gateway is None or config.fresh.source != "gateway" or not config.reward.transform.reference_from_log:
        return {}
    defaults, size = model_defaults(config.models.base_model), config.reward.transform.num_reference
    found = read_references(gateway, prompts, sampling=config.sampling, defaults=defaults, size=size)
    rollouts = [rollout for of_prompt in found.values() for rollout in of_prompt]
    scores = iter(score_logged(rollouts, samples_of(rollouts, vocabulary, defaults), scorer))
    return {text: [next(scores) for _ in of_prompt] for text, of_prompt in found.items()}


def read_references(
    gateway: GatewayClient,
    prompts: Sequence[Prompt],
    *,
    sampling: SamplingConfig,
    defaults: Mapping[str, Any],
    size: int,
) -> dict[str, list[Rollout]]:
    """Logged rollouts of the base for these prompts, at most `size` for each, by prompt text.

    They are what the run would draw: completions of the same prompt, unsteered, at the same settings, of the base that
    the engine has loaded now. Where a candidate of a request is missing, the others are not taken.

    Args:
        gateway: Its log is read, and its engine draws what is missing.
        prompts: Those of the run.
        sampling: As the run draws.
        defaults: The base model's own sampling settings, see `model_defaults`.
        size: Most rollouts of a prompt.
    """
    identity = gateway.base_identity()
    if identity is None:
        return {}
    by_text = {prompt.text: prompt for prompt in prompts}
    by_ids = {prompt.token_ids: prompt for prompt in prompts if prompt.token_ids is not None}

    def prompt_of(rollout: Rollout) -> Prompt | None:
        if rollout.prompt is None:
            return by_ids.get(tuple(rollout.prompt_token_ids))
        found = by_text.get(rollout.prompt)
        return found if found is None or found.token_ids in (None, tuple(rollout.prompt_token_ids)) else None

    def reason(rollout: Rollout) -> str | None:
        fits = is_reference(rollout, identity) and is_drawn_like(rollout, sampling, defaults)
        return None if fits and prompt_of(rollout) is not None else "other"

    found: list[Rollout] = []
    for endpoint in ENDPOINTS:
        where = RolloutFilter(endpoint=endpoint, steered=False).model_dump(exclude_none=True, exclude_defaults=True)
        found += [rollout for rollout in gateway.read_rollouts(where) if reason(rollout) is None]
    sieve = RolloutSieve(found)
    sieve.leave_out_incomplete()
    sieve.leave_out_repeats(same_draw)
    references: dict[str, list[Rollout]] = {}
    for rollout in (rollout for group in requests_of(sieve.rollouts) for rollout in group):
        prompt = prompt_of(rollout)
        if prompt is not None and len(references.setdefault(prompt.key, [])) < size:
            references[prompt.key].append(rollout)
    return references


def is_reference(rollout: Rollout, identity: str) -> bool:
    """Whether a rollout is a completion by the base that is known by `identity`, without any steering."""
    endpoint = rollout.metadata.get(ENDPOINT) if rollout.endpoint == "reference" else rollout.endpoint
    return (
        endpoint == "completions"
        and rollout.metadata.get(IDENTITY) == identity
        and not any(term.alpha != 0.0 for term in rollout.steering)
        and rollout.is_plain
        and is_fair_sample(rollout)
    )
