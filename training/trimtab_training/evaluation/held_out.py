"""Base and steered policy on held-out prompts: every figure of a training run's report."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from trimtab_training.evaluation.draws import Draws
from trimtab_training.evaluation.figures import Measure, OutcomeFigures
from trimtab_training.evaluation.intervals import Estimate, Intervals
from trimtab_training.evaluation.policies import Policy
from trimtab_training.evaluation.procedures import STANDARD, Chosen
from trimtab_training.evaluation.report import PolicyReport, Report
from trimtab_training.evaluation.sample_cache import Sample as ScoredSample
from trimtab_training.evaluation.scored import Floats, Outcome, Scored
from trimtab_training.evaluation.text_figures import (
    TextFigures,
    Texts,
    TextShifts,
    rank_correlation,
    text_figures,
    text_shifts,
)
from trimtab_training.evaluation.token_sums import TokenSums
from trimtab_training.rollouts import Sample

BASE = "base"
STEERED = "steered"


@dataclass(frozen=True, slots=True)
class Drawn:
    """What was drawn from one policy.

    Attributes:
        samples: `[prompts][samples]`, equally many for each prompt, at least one more than a procedure chooses among.
        rewards: By name of the reward, each `[prompts, samples]`; the first is the one that was trained for.
        sums: Of the samples, one prompt after the other.
    """

    samples: Sequence[Sequence[Sample]]
    rewards: dict[str, Floats]
    sums: TokenSums


@dataclass(frozen=True, slots=True)
class PolicyFigures:
    """What is known of one policy.

    Attributes:
        mean_reward: Of single samples.
        served_reward: Under the served procedure.
        texts: See there.
        num_unread: Samples that perplexity, entropy and KL leave out: empty, too long, or with unknown tokens.
        mean_second_reward: None without a second reward.
        reward_correlation: Rank correlation of both rewards over all outputs; None where one of them never changes.
    """

    mean_reward: Estimate
    served_reward: Estimate
    texts: TextFigures
    num_unread: int
    mean_second_reward: Estimate | None
    reward_correlation: Estimate | None


@dataclass(frozen=True, slots=True)
class HeldOutFigures:
    """The whole comparison. None where nothing could be measured.

    Attributes:
        num_prompts: Held-out prompts that were used.
        num_per_prompt: Outputs per prompt and policy.
        procedure: Label of the served procedure.
        kl_is_of_sampled_policy: See `evaluation.report.Report`.
        base: The base policy.
        steered: The tailored policy.
        reward_difference: Mean reward, steered minus base.
        win_rate: Of a steered output over a base output for the same prompt, ties half.
        served_reward_difference: As `reward_difference`, both under the served procedure.
        served_win_rate: As `win_rate`, both under the served procedure: the inference-time win rate.
        kl_per_token: KL(steered || base) at the tokens of steered outputs, in nats.
        kl_per_output: The same summed over an output.
        shifts: See there.
        second_reward_difference: As `reward_difference` by the second reward; None without one.
    """

    num_prompts: int
    num_per_prompt: int
    procedure: str
    kl_is_of_sampled_policy: bool
    base: PolicyFigures
    steered: PolicyFigures
    reward_difference: Estimate
    win_rate: Estimate
    served_reward_difference: Estimate
    served_win_rate: Estimate
    kl_per_token: Estimate | None
    kl_per_output: Estimate
    shifts: TextShifts
    second_reward_difference: Estimate | None

    def to_json(self) -> dict[str, Any]:
        """Flat: each estimate as `name` and `name_interval`, both ends or null where there is one prompt only."""
        return _flat(self)


@dataclass(frozen=True, slots=True)
class Comparer:
    """Turns what was drawn into figures.

    Attributes:
        intervals: Makes errors.
        procedure: What is served.
        is_plain: Whether samples were drawn at temperature 1 and top_p 1.
        max_tokens: Longest output.
        refusal_phrases: See `is_refusal`.
    """

    intervals: Intervals
    procedure: Chosen
    is_plain: bool
    max_tokens: int
    refusal_phrases: Sequence[str]

    def figures(self, base: Drawn, steered: Drawn, report: Report) -> HeldOutFigures:
        """All figures; `report` is of the same samples."""
        served = self.procedure.label
        outcomes = {(outcome.policy, outcome.procedure): outcome for outcome in report.outcomes}
        win_rates = {rate.procedure: rate.win_rate for rate in report.win_rates}
        kl = report.policies[1].figures.kl_to_base
        texts = [self._texts(drawn, is_steered=drawn is steered) for drawn in (base, steered)]
        both = [
            self._policy(drawn, text, outcomes[name, STANDARD.label], outcomes[name, served])
            for name, drawn, text in zip((BASE, STEERED), (base, steered), texts, strict=True)
        ]
        second = _second(base, steered)
        return HeldOutFigures(
            num_prompts=len(base.samples),
            num_per_prompt=len(base.samples[0]),
            procedure=served,
            kl_is_of_sampled_policy=self.is_plain,
            base=both[0],
            steered=both[1],
            reward_difference=outcomes[STEERED, STANDARD.label].mean_reward_gain,
            win_rate=win_rates[STANDARD.label],
            served_reward_difference=outcomes[STEERED, served].mean_reward_gain,
            served_win_rate=win_rates[served],
            kl_per_token=kl.per_token,
            kl_per_output=kl.per_sequence,
            shifts=text_shifts(texts[0], texts[1], self.intervals),
            second_reward_difference=None
            if second is None
            else self.intervals.mean((second[1] - second[0]).mean(axis=1)),
        )

    def report(self, base: Drawn, steered: Drawn, *, versions: dict[str, str]) -> Report:
        """The comparison in the form of `trimtab evaluate`'s report, for its plot.

        Args:
            base: Drawn from the base.
            steered: Drawn from the tailored policy.
            versions: Of the rewards.
        """
        reward, *others = base.rewards
        judge = others[0] if others else None
        measure = Measure(self.intervals, reward, judge, common_seeds=False)
        scored = {BASE: self._scored(base, is_steered=False), STEERED: self._scored(steered, is_steered=True)}
        procedures = list(dict.fromkeys((STANDARD, self.procedure)))

        def outcome(name: str, procedure: Chosen) -> Outcome:
            return Outcome(name, procedure, scored[name], reward)

        one = outcome(BASE, STANDARD)
        outcomes: list[OutcomeFigures] = [
            measure.outcome(outcome(name, chosen), outcome(BASE, chosen), one, is_exact=self.is_plain or name == BASE)
            for chosen in procedures
            for name in scored
        ]
        interval = self.intervals
        return Report(
            settings={
                "reward": reward,
                "judge": judge,
                "procedures": [chosen.label for chosen in procedures],
                "samples": len(base.samples[0]),
                "seed": interval.seed,
                "interval": {
                    "method": interval.method,
                    "confidence": interval.confidence,
                    "num_resamples": interval.num_resamples,
                },
            },
            prompts={"num": len(base.samples)},
            rewards=versions,
            reference=BASE,
            kl_is_of_sampled_policy=self.is_plain,
            policies=tuple(
                PolicyReport(
                    Policy(name, name, request=None, steering=None, revision=None),
                    measure.policy(side, scored[BASE], is_exact=self.is_plain or name == BASE),
                )
                for name, side in scored.items()
            ),
            outcomes=tuple(outcomes),
            win_rates=tuple(measure.win_rate(outcome(STEERED, c), outcome(BASE, c)) for c in procedures),
            differences=(),
            times={},
        )

    def _policy(self, drawn: Drawn, texts: Texts, standard: OutcomeFigures, served: OutcomeFigures) -> PolicyFigures:
        rewards = list(drawn.rewards.values())
        return PolicyFigures(
            mean_reward=standard.mean_reward,
            served_reward=served.mean_reward,
            texts=text_figures(texts, self.intervals),
            num_unread=drawn.sums.num_unread,
            mean_second_reward=standard.judge_mean_reward,
            reward_correlation=rank_correlation(rewards[0], rewards[1], self.intervals) if len(rewards) == 2 else None,
        )

    def _texts(self, drawn: Drawn, *, is_steered: bool) -> Texts:
        return Texts.of(drawn.samples, drawn.sums, is_steered=is_steered, refusal_phrases=self.refusal_phrases)

    def _scored(self, drawn: Drawn, *, is_steered: bool) -> Scored:
        sums = drawn.sums
        kls = sums.kl if is_steered else np.zeros_like(sums.kl)  # of the base to itself
        ratios = sums.steered_logprob - sums.base_logprob if is_steered else np.zeros_like(sums.kl)
        values = zip(sums.num_tokens.tolist(), ratios.tolist(), kls.tolist(), strict=True)
        rows = tuple(tuple(self._scored_sample(sample, *next(values)) for sample in group) for group in drawn.samples)
        return Scored(Draws(rows), drawn.rewards)

    def _scored_sample(self, sample: Sample, num_read: float, log_ratio: float, token_kl: float) -> ScoredSample:
        reason = "length" if len(sample.output_token_ids) >= self.max_tokens else "stop"
        return ScoredSample(sample.output, int(num_read), log_ratio, token_kl, reason)


def _second(base: Drawn, steered: Drawn) -> tuple[Floats, Floats] | None:
    names = list(base.rewards)
    return (base.rewards[names[1]], steered.rewards[names[1]]) if len(names) == 2 else None


def _flat(value: Any) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for field in fields(value):
        found = getattr(value, field.name)
        if isinstance(found, Estimate):
            has_interval = found.low is not None and found.high is not None
            flat[field.name] = found.value
            flat[f"{field.name}_interval"] = [found.low, found.high] if has_interval else None
        elif found is None:  # what may be missing is an estimate
            flat[field.name] = flat[f"{field.name}_interval"] = None
        elif isinstance(found, TextFigures | TextShifts):
            flat |= _flat(found)
        elif is_dataclass(found):
            flat[field.name] = _flat(found)
        else:
            flat[field.name] = found
    return flat
