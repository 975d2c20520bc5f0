"""Whether a version may take traffic: its figures on held-out prompts against the configured thresholds."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from trimtab_training.diagnostics import Diagnosis
from trimtab_training.evaluation.held_out import HeldOutFigures
from trimtab_training.evaluation.intervals import Estimate
from trimtab_training.gate_config import GateConfig

NOT_EVALUATED = "nothing was held out, so nothing is known of the version"


@dataclass(frozen=True, slots=True)
class Check:
    """One threshold.

    Attributes:
        name: Its setting.
        figure: What was held against it; None where it could not be measured.
        limit: The setting's value.
        is_passed: Whether it holds.
    """

    name: str
    figure: float | None
    limit: float
    is_passed: bool


@dataclass(frozen=True, slots=True)
class GateResult:
    """The decision.

    Attributes:
        passed: Whether every check and no refused failure was found.
        reasons: Why not, for people; empty when passed.
        checks: Every threshold that is set.
    """

    passed: bool
    reasons: tuple[str, ...]
    checks: tuple[Check, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As `evaluation.gate` of the manifest."""
        return {"passed": self.passed, "reasons": list(self.reasons), "checks": [asdict(c) for c in self.checks]}


@dataclass(frozen=True, slots=True)
class _Rule:
    """How a figure stands to its threshold, and what to say where it does not hold."""

    name: str
    figure: float | None
    relation: Literal["above", "at least", "at most"]
    what: str

    def check(self, limit: float) -> Check:
        figure = self.figure
        holds = (
            figure is not None
            and {
                "above": figure > limit,
                "at least": figure >= limit,
                "at most": figure <= limit,
            }[self.relation]
        )
        return Check(self.name, figure, limit, holds)

    def reason(self, limit: float) -> str:
        if self.figure is None:
            return f"{self.what} could not be measured; it must be {self.relation} {limit:g} ({self.name})"
        return f"{self.what} is {self.figure:.4g}; it must be {self.relation} {limit:g} ({self.name})"


def decide(config: GateConfig, figures: HeldOutFigures | None, diagnoses: Sequence[Diagnosis]) -> GateResult:
    """Hold figures against thresholds.

    Args:
        config: The thresholds.
        figures: None when nothing was held out: then the gate is closed.
        diagnoses: What `diagnose` found in the same figures.
    """
    if figures is None:
        return GateResult(False, (NOT_EVALUATED,))
    limits = [(rule, getattr(config, rule.name)) for rule in _rules(figures)]
    checks = [(rule, rule.check(limit), limit) for rule, limit in limits if limit is not None]
    reasons = [rule.reason(limit) for rule, check, limit in checks if not check.is_passed]
    reasons += [
        f"{diagnosis.signature}: {diagnosis.evidence}"
        for diagnosis in diagnoses
        if diagnosis.signature in config.refused_signatures
    ]
    return GateResult(not reasons, tuple(reasons), tuple(check for _, check, _ in checks))


def _rules(figures: HeldOutFigures) -> list[_Rule]:
    shifts = figures.shifts
    rules = [
        _Rule(
            "min_reward_difference",
            figures.reward_difference.low,
            "above",
            "the lower end of the interval of the reward difference",
        ),
        _Rule(
            "min_served_win_rate",
            figures.served_win_rate.low,
            "at least",
            f"the lower end of the interval of the win rate under {figures.procedure}",
        ),
        _Rule("max_perplexity_ratio", _value(shifts.perplexity_ratio), "at most", "the perplexity ratio"),
        _Rule("max_kl_per_token", _value(figures.kl_per_token), "at most", "the KL per token"),
        _Rule("max_kl_per_output", figures.kl_per_output.value, "at most", "the KL per output"),
        _Rule("max_length_ratio", _value(shifts.length_ratio), "at most", "the length ratio"),
        _Rule("min_length_ratio", _value(shifts.length_ratio), "at least", "the length ratio"),
        _Rule("max_refusal_shift", shifts.refusal_shift.value, "at most", "the rise of the share of refusals"),
        _Rule(
            "min_second_reward_difference",
            _value(figures.second_reward_difference),
            "at least",
            "the second reward's difference",
        ),
    ]
    if _has_pairs(figures):
        rules.append(_Rule("min_distinct_2_ratio", _value(shifts.distinct_2_ratio), "at least", "the distinct-2 ratio"))
    return rules


def _has_pairs(figures: HeldOutFigures) -> bool:
    """Whether any output, of either policy, has two tokens."""
    return any(side.texts.distinct_2 is not None for side in (figures.base, figures.steered))


def _value(estimate: Estimate | None) -> float | None:
    return None if estimate is None else estimate.value
