"""What a version must show on held-out prompts before it may take traffic."""

from typing import Annotated

from pydantic import BeforeValidator, Field

from trimtab_training.config_section import ConfigSection
from trimtab_training.failure_signatures import DEGRADED_PERPLEXITY_RATIO, Signature


def _off(value: object) -> object:
    """TOML has no null."""
    return None if value == "off" else value


Threshold = Annotated[float | None, BeforeValidator(_off)]
PositiveThreshold = Annotated[Annotated[float, Field(gt=0)] | None, BeforeValidator(_off)]


class GateConfig(ConfigSection):
    """Thresholds; `"off"` (in JSON also null) drops one. A figure that could not be measured does not pass.

    The gain must be certain: the lower end of its 95 % interval counts. Of what it costs the estimates count.
    """

    min_reward_difference: Threshold = 0.0
    """The lower end of the interval of the reward difference to the base lies above this."""
    min_served_win_rate: Threshold = None
    """The lower end of the interval of the win rate under the served procedure is at least this."""
    max_perplexity_ratio: PositiveThreshold = DEGRADED_PERPLEXITY_RATIO
    """Most that the perplexity under the base may be, steered outputs over base outputs."""
    max_kl_per_token: PositiveThreshold = None
    """Most KL(steered || base) per token, in nats."""
    max_kl_per_output: PositiveThreshold = None
    """Most KL(steered || base) per output, in nats."""
    min_distinct_2_ratio: Threshold = 0.7
    """Least that distinct-2 may be, steered over base. Outputs of single tokens, steered and base, need none."""
    max_length_ratio: PositiveThreshold = 2.0
    """Most that the mean length may be, steered over base."""
    min_length_ratio: Threshold = 0.5
    """Least that it may be."""
    max_refusal_shift: Threshold = 0.05
    """Most that the share of refusals may rise."""
    min_second_reward_difference: Threshold = None
    """The estimate of the second reward's difference to the base is at least this; needs `evaluation.second_reward`."""
    refused_signatures: tuple[Signature, ...] = ("collapsed_adapter",)
    """Failures (`report.json` names them under `diagnoses`) that a version may not show, whatever its figures."""
