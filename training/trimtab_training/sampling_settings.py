"""What a rollout's sampling settings say of the distribution that it was drawn from."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_adapters.contract.params import FAILED_LOGPROB
from trimtab_adapters.contract.records import Rollout
from trimtab_adapters.contract.reference_policy import SELECTION
from trimtab_training.config import SamplingConfig

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "temperature": (1,),
    "top_p": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_tokens": (0,),
    "logit_bias": ({},),
    "bad_words": ([],),
}
"""Settings that shape the distribution of a token, and the values at which they leave the model's own."""

_ENDS = ("max_tokens", "max_completion_tokens", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos")
"""Settings that say where an output ends, and leave the distribution of each token alone."""

_OF_PROMPT = frozenset(
    {
        *("add_special_tokens", "truncate_prompt_tokens", "truncation_side", "chat_template", "chat_template_kwargs"),
        *("add_generation_prompt", "continue_final_message"),
    }
)
"""Settings that say how the prompt became the token ids that are logged."""

_NO_EFFECT = frozenset(
    {
        # which of the draws
        "seed",
        # how the answer is shown and computed
        *("skip_special_tokens", "spaces_between_special_tokens", "return_tokens_as_token_ids", "prompt_logprobs"),
        *("logprob_token_ids", "echo", "stream_interval", "priority", "cache_salt", "session_id"),
    }
)
_FAIR = (None, "soft", "poisson")
"""Strategies that draw all candidates before they look at any; what others leave is no fair sample of the policy."""

_BY_MODEL = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def model_defaults(base_model: Path) -> dict[str, Any]:
    """What vLLM takes where a request does not say: the settings in the model's own `generation_config.json`.

    Raises:
        InvalidRequestError: The file is not JSON.
    """
    path = base_model / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise InvalidRequestError(f"{path} cannot be read: {exc}") from exc
    return {name: found[name] for name in _BY_MODEL if found.get(name) is not None}


def shaping(sampling: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a rollout that kept its tokens from being drawn from the policy's own distribution, if any.

    Args:
        sampling: As logged.
        defaults: Of the model, see `model_defaults`.
    """
    passed = _NO_EFFECT.union(_OF_PROMPT, _ENDS)
    return {
        name: value
        for name, value in {**defaults, **_given(sampling)}.items()
        if name not in passed and value not in NEUTRAL.get(name, ())
    }


def off_policy_reason(rollout: Rollout, defaults: Mapping[str, Any]) -> str | None:
    """Why its recorded log-probabilities are not those of what it was drawn from; None where they are.

    They are the steered ones before temperature and whatever else cuts or bends the distribution, so they are right
    where none of that happened, and where nobody looked at the candidates before all were drawn.
    """
    if not rollout.is_plain:
        return "operators"
    if not is_fair_sample(rollout):
        return "strategy"
    if shaped := shaping(rollout.sampling, defaults):
        return f"sampling_{min(shaped)}"
    if not (_are_logprobs(rollout.steered_logprobs, rollout) and _are_logprobs(rollout.base_logprobs, rollout)):
        return "no_logprobs"
    return None


def is_fair_sample(rollout: Rollout) -> bool:
    """Whether all candidates of its request were drawn before anybody looked at one."""
    return rollout.metadata.get(SELECTION) in _FAIR


def is_drawn_like(rollout: Rollout, sampling: SamplingConfig, defaults: Mapping[str, Any]) -> bool:
    """Whether a logged completion has the settings that a run draws with."""
    given = _given(rollout.sampling)
    ends = {name: given[name] for name in _ENDS if given.get(name) not in (None, [], False)}
    stops = {"stop": list(sampling.stop), "stop_token_ids": list(sampling.stop_token_ids)}
    mine = {"temperature": sampling.temperature, "top_p": sampling.top_p}
    return (
        not _OF_PROMPT & given.keys()
        and ends == {"max_tokens": sampling.max_tokens, **{name: stop for name, stop in stops.items() if stop}}
        and shaping(rollout.sampling, defaults) == shaping(mine, {})
    )


def _given(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that say anything: null leaves it to the model's defaults."""
    return {name: value for name, value in sampling.items() if value is not None}


def _are_logprobs(values: list[float] | None, rollout: Rollout) -> bool:
    return (
        values is not None
        and len(values) == len(rollout.output_token_ids)
        and all(math.isfinite(value) and value > FAILED_LOGPROB for value in values)
    )
