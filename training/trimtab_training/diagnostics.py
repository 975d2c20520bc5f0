"""The ways in which training of an adapter fails, named when its figures on held-out prompts show them.

Three are those that IPA's authors warn of; the fourth is what a second reward is there to find.
"""

from dataclasses import dataclass

from trimtab_training.evaluation.held_out import HeldOutFigures
from trimtab_training.evaluation.intervals import Estimate
from trimtab_training.failure_signatures import (
    COLLAPSED_AGAINST_BASE,
    COLLAPSED_DISTINCT_2_RATIO,
    COLLAPSED_ENTROPY,
    COLLAPSED_REPEAT_RATE,
    DEGRADED_PERPLEXITY_RATIO,
    Signature,
)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """A failure that the figures show.

    Attributes:
        signature: Which.
        evidence: What shows it, for people.
    """

    signature: Signature
    evidence: str


def diagnose(figures: HeldOutFigures) -> list[Diagnosis]:
    """Every failure that the figures show, at most one of each kind."""
    found = (collapsed_adapter(figures), no_improvement(figures), degraded_fluency(figures), over_optimisation(figures))
    return [diagnosis for diagnosis in found if diagnosis is not None]


def collapsed_adapter(figures: HeldOutFigures) -> Diagnosis | None:
    """Variety is gone, the next token is nearly certain, or outputs repeat, each much more than the base's."""
    base, steered = figures.base.texts, figures.steered.texts
    signs: list[str] = []
    ratio = figures.shifts.distinct_2_ratio
    if ratio is not None and ratio.value < COLLAPSED_DISTINCT_2_RATIO:
        signs.append(f"distinct-2 is {ratio.value:.2f} of the base's (below {COLLAPSED_DISTINCT_2_RATIO})")
    entropy, usual = _value(steered.entropy_per_token), _value(base.entropy_per_token)
    if entropy is not None and usual is not None and entropy < min(COLLAPSED_ENTROPY, COLLAPSED_AGAINST_BASE * usual):
        signs.append(f"the entropy is {entropy:.3f} nats per token (below {COLLAPSED_ENTROPY}; the base's {usual:.3f})")
    repeats, usual = _value(steered.repeat_rate), _value(base.repeat_rate)
    if (
        repeats is not None
        and usual is not None
        and repeats >= COLLAPSED_REPEAT_RATE
        and usual <= COLLAPSED_AGAINST_BASE * repeats
    ):
        signs.append(
            f"two outputs for a prompt are the same with probability {repeats:.2f} (from {COLLAPSED_REPEAT_RATE} on; "
            f"the base's {usual:.2f})"
        )
    return Diagnosis("collapsed_adapter", "; ".join(signs)) if signs else None


def no_improvement(figures: HeldOutFigures) -> Diagnosis | None:
    """The interval of the reward difference does not lie above 0; without an interval there is nothing to show it."""
    difference = figures.reward_difference
    if difference.low is None or difference.high is None:
        return Diagnosis("no_improvement", "a single held-out prompt shows no difference")
    if difference.low > 0:
        return None
    what = "contains 0" if difference.high >= 0 else "lies below 0"
    return Diagnosis("no_improvement", f"the interval of the reward difference, {_interval(difference)}, {what}")


def degraded_fluency(figures: HeldOutFigures) -> Diagnosis | None:
    """The base finds steered outputs much less likely than its own."""
    ratio = figures.shifts.perplexity_ratio
    if ratio is None or ratio.value <= DEGRADED_PERPLEXITY_RATIO:
        return None
    return Diagnosis(
        "degraded_fluency",
        f"the perplexity under the base is {ratio.value:.2f} times that of its own outputs (above "
        f"{DEGRADED_PERPLEXITY_RATIO})",
    )


def over_optimisation(figures: HeldOutFigures) -> Diagnosis | None:
    """The reward rose while the second reward fell, both beyond their intervals."""
    first, second = figures.reward_difference, figures.second_reward_difference
    if second is None or first.low is None or second.high is None or first.low <= 0 or second.high >= 0:
        return None
    return Diagnosis(
        "over_optimisation",
        f"the reward rose by {_interval(first)} while the second reward fell by {_interval(second)}",
    )


def _value(estimate: Estimate | None) -> float | None:
    return None if estimate is None else estimate.value


def _interval(estimate: Estimate) -> str:
    return f"[{estimate.low:.4g}, {estimate.high:.4g}]"
