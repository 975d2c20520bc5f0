"""The comparison of base and steered policy that ends a training run."""

from typing import Literal

from pydantic import Field, field_validator

from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_training.config_section import ConfigSection
from trimtab_training.evaluation.procedures import Chosen, parse_procedure
from trimtab_training.evaluation.refusals import REFUSAL_PHRASES

SERVED = "served"


class SecondRewardConfig(ConfigSection):
    """A reward that is not trained for: where it falls while the first rises, the first is over-optimised."""

    name: str
    """Name of the reward."""
    source: Literal["gateway", "local"] = "gateway"
    """Whether the gateway scores, or the entry point of that name (group `trimtab.rewards`) in this process."""
    batch_size: int = Field(default=256, ge=1, le=4096)
    """Outputs per scoring call."""


class EvaluationConfig(ConfigSection):
    """Base against steered on prompts that are never trained on."""

    share: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the prompts that is held out; 0 skips the evaluation."""
    max_prompts: int = Field(default=256, ge=1)
    """Most held-out prompts to use; prompts beyond it stay held out."""
    num_per_prompt: int = Field(default=4, ge=1, le=1024)
    """Outputs per prompt and policy; at least one more is drawn than `procedure` chooses among."""
    num_resamples: int = Field(default=2000, ge=100)
    """Bootstrap resamples behind the 95 % intervals."""
    procedure: str = SERVED
    """Inference-time procedure of the second win rate: `standard`, `best_of_n:N` or `worst_of_n:N`. `served` is the
    best-of-N of the route that is published to; without one, what `reward.transform` is made for; else `standard`."""
    refusal_phrases: tuple[str, ...] = REFUSAL_PHRASES
    """An output with one of these is counted as a refusal; case does not matter."""
    second_reward: SecondRewardConfig | None = None
    """A reward to watch for over-optimisation."""

    @field_validator("procedure")
    @classmethod
    def _is_procedure(cls, text: str) -> str:
        if text != SERVED:
            try:
                if not isinstance(parse_procedure(text), Chosen):
                    raise ValueError("an answer chosen by the gateway itself cannot be worked out from samples here")
            except InvalidRequestError as exc:
                raise ValueError(exc.message) from exc
        return text

    @field_validator("refusal_phrases")
    @classmethod
    def _says_something(cls, phrases: tuple[str, ...]) -> tuple[str, ...]:
        if not all(phrase.strip() for phrase in phrases):
            raise ValueError("an empty phrase is in every output")
        return phrases
