"""All samples of a run side by side: every figure of its report."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trimtab_training.evaluation.figures import Measure, OutcomeFigures, WinRate, WinRateDifference
from trimtab_training.evaluation.intervals import Intervals
from trimtab_training.evaluation.policies import Policy
from trimtab_training.evaluation.procedures import STANDARD, Procedure, Served
from trimtab_training.evaluation.report import PolicyReport, Report
from trimtab_training.evaluation.scored import Outcome, Scored
from trimtab_training.evaluation.settings import EvaluateConfig, Side

_ECHOED = {
    *("reward", "judge", "procedures", "pairs", "samples", "seed", "common_seeds", "sampling", "interval"),
    "max_prompts",
}
"""Settings that the figures depend on."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What there is to compare.

    Attributes:
        config: Of the run.
        policies: By name, in the order of the configuration.
        scored: The samples of each policy, plain (None) and as the gateway chose them.
    """

    config: EvaluateConfig
    policies: Mapping[str, Policy]
    scored: Mapping[tuple[str, Served | None], Scored]

    def report(self, *, prompts: Mapping[str, Any], rewards: Mapping[str, str], times: Mapping[str, float]) -> Report:
        """The report; the arguments are its fields."""
        interval, config = self.config.interval, self.config
        measure = Measure(
            Intervals(interval.method, interval.confidence, interval.num_resamples, config.seed),
            config.reward,
            config.judge,
            config.common_seeds,
        )
        return Report(
            settings=config.model_dump(mode="json", include=_ECHOED),
            prompts=prompts,
            rewards=rewards,
            reference=config.reference_name,
            kl_is_of_sampled_policy=self._samples_plainly,
            policies=tuple(self._policies(measure)),
            outcomes=tuple(self._outcomes(measure)),
            win_rates=tuple(self._win_rates(measure)),
            differences=tuple(self._differences(measure)),
            times=times,
        )

    def _policies(self, measure: Measure) -> list[PolicyReport]:
        reference = self.scored[self.config.reference_name, None]
        return [
            PolicyReport(policy, measure.policy(self.scored[name, None], reference, is_exact=self._is_exact(name)))
            for name, policy in self.policies.items()
        ]

    def _outcomes(self, measure: Measure) -> list[OutcomeFigures]:
        reference = self.config.reference_name
        one = self._outcome(reference, STANDARD)
        return [
            measure.outcome(
                self._outcome(name, procedure),
                self._outcome(reference, procedure),
                one,
                is_exact=self._is_exact(name),
            )
            for procedure in self.config.parsed_procedures
            for name in self.policies
        ]

    def _win_rates(self, measure: Measure) -> list[WinRate]:
        reference = self.config.reference_name
        same = [
            measure.win_rate(self._outcome(name, procedure), self._outcome(reference, procedure))
            for procedure in self.config.parsed_procedures
            for name in self._others
        ]
        return same + [measure.win_rate(self._side(first), self._side(second)) for first, second in self.config.pairs]

    def _differences(self, measure: Measure) -> list[WinRateDifference]:
        return [
            measure.difference(
                self._outcome(second, procedure),
                self._outcome(first, procedure),
                self._outcome(self.config.reference_name, procedure),
            )
            for procedure in self.config.parsed_procedures
            for i, first in enumerate(self._others)
            for second in self._others[i + 1 :]
        ]

    @property
    def _others(self) -> list[str]:
        return [name for name in self.policies if name != self.config.reference_name]

    @property
    def _samples_plainly(self) -> bool:
        return self.config.sampling.temperature == 1.0 and self.config.sampling.top_p == 1.0

    def _is_exact(self, name: str) -> bool:
        """Whether the recorded log-probabilities are those that were sampled from; the base is 0 from itself anyhow."""
        return self._samples_plainly or self.policies[name].steering is None

    def _outcome(self, name: str, procedure: Procedure) -> Outcome:
        served = procedure if isinstance(procedure, Served) else None
        return Outcome(name, procedure, self.scored[name, served], self.config.reward)

    def _side(self, side: Side) -> Outcome:
        return self._outcome(side.policy, side.parsed)
