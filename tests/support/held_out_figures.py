"""Figures of a good run, of which tests change some."""

from dataclasses import replace
from typing import Any

from trimtab_training.evaluation.held_out import HeldOutFigures, PolicyFigures
from trimtab_training.evaluation.intervals import Estimate
from trimtab_training.evaluation.text_figures import TextFigures, TextShifts


def estimate(value: float, half: float = 0.01) -> Estimate:
    """A value with an interval of this half-width."""
    return Estimate(value, half / 2, value - half, value + half, "percentile")


_TEXTS = TextFigures(
    base_perplexity=estimate(20.0),
    entropy_per_token=estimate(2.0),
    distinct_1=estimate(0.6),
    distinct_2=estimate(0.8),
    distinct_3=estimate(0.9),
    repeat_rate=estimate(0.05),
    mean_tokens=estimate(30.0),
    refusal_share=estimate(0.1),
)
_POLICY = PolicyFigures(estimate(0.3), estimate(0.5), _TEXTS, 0, None, None)
_SHIFTS = TextShifts(
    perplexity_ratio=estimate(1.1),
    distinct_1_ratio=estimate(0.9),
    distinct_2_ratio=estimate(0.9),
    distinct_3_ratio=estimate(0.9),
    length_difference=estimate(1.0),
    length_ratio=estimate(1.0),
    refusal_shift=estimate(0.0),
)
_GOOD = HeldOutFigures(
    num_prompts=100,
    num_per_prompt=4,
    procedure="best_of_n:4",
    kl_is_of_sampled_policy=True,
    base=_POLICY,
    steered=_POLICY,
    reward_difference=estimate(0.1),
    win_rate=estimate(0.6),
    served_reward_difference=estimate(0.1),
    served_win_rate=estimate(0.6),
    kl_per_token=estimate(0.1),
    kl_per_output=estimate(3.0),
    shifts=_SHIFTS,
    second_reward_difference=None,
)


def good_figures(
    *, base: dict[str, Any] | None = None, steered: dict[str, Any] | None = None, **changes: Any
) -> HeldOutFigures:
    """The figures with changes: of `base` and `steered` those of the texts, else by name, shifts included."""
    shifts = {name: changes.pop(name) for name in list(changes) if hasattr(_SHIFTS, name)}
    policies: dict[str, Any] = {
        name: replace(_POLICY, texts=replace(_TEXTS, **(texts or {})))
        for name, texts in (("base", base), ("steered", steered))
    }
    return replace(_GOOD, shifts=replace(_SHIFTS, **shifts), **policies, **changes)
