"""The figures of a report: means over prompts with their errors, from scored samples."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trimtab_adapters.contract.best_of_n import best_of_n_kl_upper_bound
from trimtab_training.evaluation.intervals import Estimate, Intervals
from trimtab_training.evaluation.procedures import STANDARD, Served
from trimtab_training.evaluation.scored import Floats, Outcome, Scored, calibrated_histogram, win_rates
from trimtab_training.evaluation.selection_kl import selection_kl

NUM_BINS = 10
UNIT = (0.0, 1.0)


@dataclass(frozen=True, slots=True)
class PolicyKl:
    """KL(policy || base), in nats, by two unbiased estimates.

    Attributes:
        per_sequence: Sum over tokens of the exact KL of the next-token distributions, meaned over samples.
        per_token: The same over the number of tokens; None without a token.
        per_sequence_log_ratio: Mean of log policy - log base of whole outputs: noisier, another way to the same.
            None where samples were not drawn from the distribution that the log-probabilities are of.
        per_token_log_ratio: Likewise.
    """

    per_sequence: Estimate
    per_token: Estimate | None
    per_sequence_log_ratio: Estimate | None
    per_token_log_ratio: Estimate | None


@dataclass(frozen=True, slots=True)
class PolicyFigures:
    """What is known of a policy's plain samples.

    Attributes:
        mean_tokens: Generated tokens per sample.
        truncated: Share of samples that `max_tokens` cut.
        kl_to_base: See there.
        calibrated_reward: Mean calibrated reward against the reference policy's own samples for the prompt.
        calibrated_histogram: Shares of ten bins of equal width; about 0.1 each for the reference policy itself.
    """

    mean_tokens: float
    truncated: float
    kl_to_base: PolicyKl
    calibrated_reward: Estimate
    calibrated_histogram: list[float]


@dataclass(frozen=True, slots=True)
class OutcomeKl:
    """KL(procedure of the policy || base) in nats per sequence, by the chain rule; None where it is not known.

    Attributes:
        selection_bound: log n - (n - 1) / n, the most that choosing among n can add.
        selection: KL(procedure of the policy || policy), ties taken into account.
        shift: Mean of log policy - log base under the procedure. Of a single sample the sum of token KLs.
        total_bound: `selection_bound` + `shift`.
        total: `selection` + `shift`.
    """

    selection_bound: float | None
    selection: Estimate | None
    shift: Estimate | None
    total_bound: Estimate | None
    total: Estimate | None


@dataclass(frozen=True, slots=True)
class OutcomeFigures:
    """What is known of a policy under a procedure.

    Attributes:
        policy: Its name.
        procedure: Its label.
        mean_reward: Of the answers.
        mean_reward_gain: Over the reference policy under the same procedure, prompt by prompt.
        calibrated_reward: Mean calibrated reward: the win rate over one sample of the reference policy. None where the
            samples do not suffice.
        judge_mean_reward: As `mean_reward` by the judge; None without one.
        judge_calibrated_reward: As `calibrated_reward` by the judge.
        kl_to_base: See there.
    """

    policy: str
    procedure: str
    mean_reward: Estimate
    mean_reward_gain: Estimate
    calibrated_reward: Estimate | None
    judge_mean_reward: Estimate | None
    judge_calibrated_reward: Estimate | None
    kl_to_base: OutcomeKl


@dataclass(frozen=True, slots=True)
class WinRate:
    """How often one side beats another, ties half."""

    policy: str
    procedure: str
    opponent: str
    opponent_procedure: str
    win_rate: Estimate
    judge_win_rate: Estimate | None


@dataclass(frozen=True, slots=True)
class WinRateDifference:
    """Win rate over the reference of one policy minus that of another, under one procedure, prompt by prompt."""

    policy: str
    other: str
    procedure: str
    difference: Estimate
    judge_difference: Estimate | None


@dataclass(frozen=True, slots=True)
class Measure:
    """Turns scored samples into figures.

    Attributes:
        intervals: Makes errors.
        reward: Name of the reward.
        judge: Name of the second one.
        common_seeds: Whether samples of one index share their noise.
    """

    intervals: Intervals
    reward: str
    judge: str | None
    common_seeds: bool

    def policy(self, scored: Scored, reference: Scored, *, is_exact: bool) -> PolicyFigures:
        """Figures of plain samples.

        Args:
            scored: The policy's.
            reference: The reference policy's.
            is_exact: Whether the samples were drawn from the distribution that their log-probabilities are of.
        """
        is_disjoint = self.common_seeds or scored is reference
        rewards, others = scored.rewards[self.reward], reference.rewards[self.reward]
        plain, against = (Outcome("", STANDARD, side, self.reward) for side in (scored, reference))
        reasons = [sample.finish_reason for row in scored.draws.samples for sample in row]
        return PolicyFigures(
            mean_tokens=float(scored.draws.num_tokens.mean()),
            truncated=reasons.count("length") / len(reasons),
            kl_to_base=self._policy_kl(scored, is_exact=is_exact),
            calibrated_reward=self._win_rate(plain, against, self.reward, is_disjoint=is_disjoint),
            calibrated_histogram=calibrated_histogram(rewards, others, is_disjoint=is_disjoint, num_bins=NUM_BINS),
        )

    def outcome(self, outcome: Outcome, same: Outcome, one: Outcome, *, is_exact: bool) -> OutcomeFigures:
        """Figures of a policy under a procedure.

        Args:
            outcome: The policy's.
            same: The reference policy under the same procedure.
            one: The reference policy's single samples.
            is_exact: As in `policy`.
        """
        means = outcome.mean(outcome.choosing)
        judged = outcome.scored.rewards[self.judge] if self.judge is not None else None
        calibrated = [self._calibrated(outcome, one, name) for name in (self.reward, self.judge)]
        return OutcomeFigures(
            policy=outcome.policy,
            procedure=outcome.procedure.label,
            mean_reward=self.intervals.mean(means),
            mean_reward_gain=self.intervals.mean(means - same.mean(same.choosing)),
            calibrated_reward=calibrated[0],
            judge_mean_reward=None if judged is None else self.intervals.mean(outcome.mean(judged)),
            judge_calibrated_reward=calibrated[1],
            kl_to_base=self._outcome_kl(outcome, is_exact=is_exact),
        )

    def win_rate(self, first: Outcome, second: Outcome) -> WinRate:
        """How often the first side beats the second."""
        is_disjoint = self._is_disjoint(first, second)
        rate, judged = (
            None if name is None else self._win_rate(first, second, name, is_disjoint=is_disjoint)
            for name in (self.reward, self.judge)
        )
        assert rate is not None
        return WinRate(first.policy, first.procedure.label, second.policy, second.procedure.label, rate, judged)

    def difference(self, one: Outcome, other: Outcome, reference: Outcome) -> WinRateDifference:
        """Win rate of one policy over the reference minus that of another, all under the same procedure."""

        def of(name: str) -> Estimate:
            rates = [
                win_rates(side, reference, name, is_disjoint=self._is_disjoint(side, reference))
                for side in (one, other)
            ]
            return self.intervals.mean(rates[0] - rates[1], bounds=(-1.0, 1.0))

        judged = None if self.judge is None else of(self.judge)
        return WinRateDifference(one.policy, other.policy, one.procedure.label, of(self.reward), judged)

    def _is_disjoint(self, first: Outcome, second: Outcome) -> bool:
        return self.common_seeds or first.scored is second.scored

    def _win_rate(self, first: Outcome, second: Outcome, by: str, *, is_disjoint: bool) -> Estimate:
        return self.intervals.mean(win_rates(first, second, by, is_disjoint=is_disjoint), bounds=UNIT)

    def _calibrated(self, outcome: Outcome, one: Outcome, by: str | None) -> Estimate | None:
        is_disjoint = self._is_disjoint(outcome, one)
        if by is None or (is_disjoint and outcome.chosen.n + 1 > outcome.choosing.shape[1]):
            return None
        return self._win_rate(outcome, one, by, is_disjoint=is_disjoint)

    def _policy_kl(self, scored: Scored, *, is_exact: bool) -> PolicyKl:
        draws = scored.draws
        tokens = draws.num_tokens.sum(axis=1)

        def both(values: Floats) -> tuple[Estimate, Estimate | None]:
            return self.intervals.mean(values.mean(axis=1)), self.intervals.ratio(values.sum(axis=1), tokens)

        by_token = both(draws.token_kls)
        by_ratio = both(draws.log_ratios) if is_exact else (None, None)
        return PolicyKl(*by_token, *by_ratio)

    def _outcome_kl(self, outcome: Outcome, *, is_exact: bool) -> OutcomeKl:
        draws, n = outcome.scored.draws, outcome.chosen.n
        if isinstance(outcome.procedure, Served):
            shift = self.intervals.mean(draws.log_ratios.mean(axis=1)) if is_exact else None
            return OutcomeKl(None, None, shift, None, None)
        bound = best_of_n_kl_upper_bound(n)
        kls = np.array([selection_kl(rewards, outcome.chosen) for rewards in outcome.choosing])
        selection = self.intervals.mean(kls)
        if n > 1 and not is_exact:
            return OutcomeKl(bound, selection, None, None, None)
        shifts = outcome.mean(draws.log_ratios if n > 1 else draws.token_kls)
        totals: Sequence[Estimate] = [self.intervals.mean(shifts + more) for more in (0.0, bound, kls)]
        return OutcomeKl(bound, selection, *totals)
