"""Whether a canary is promoted, rolled back, or watched on: pure, from what came of both arms."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from trimtab_server.canary.outcomes import ArmOutcomes, CanaryOutcomes

LOOKS = 4
"""Comparisons by number of answers: at a quarter, a half, three quarters and the whole of it."""
LEVEL = 0.05
"""Odds of rolling back a version that is as good as the old one, at most: Bonferroni's inequality over all looks (one
more may come by time) and both tests."""
LEVEL_OF_A_TEST = LEVEL / (2 * (LOOKS + 1))


@dataclass(frozen=True, slots=True)
class CanaryRule:
    """When a canary is over.

    Attributes:
        num_answers: Answered or failed requests of the canary after which it is promoted, unless it is worse.
        min_answers: With fewer when the time is up, nothing is known of it, and it is rolled back.
        timeout_s: Time after which it ends in any case.
    """

    num_answers: int
    min_answers: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do, and why."""

    action: Literal["wait", "promote", "roll_back"]
    reason: str = ""


WAIT = Verdict("wait")


def decide(outcomes: CanaryOutcomes, rule: CanaryRule, age_s: float) -> Verdict:
    """Judge a canary. Counts a look in `outcomes` whenever the arms are compared.

    The canary is worse when its rewards are lower by Welch's t-test, or its errors more frequent by Fisher's exact
    test, one-sided, at `LEVEL_OF_A_TEST`. It is promoted when that was not found: it need not be shown to be better,
    which the gate did.

    Args:
        outcomes: Of the revision that has the canary.
        rule: When it is over.
        age_s: Since it began.
    """
    canary, stable = outcomes.canary, outcomes.stable
    is_timed_out = age_s >= rule.timeout_s
    if is_timed_out and canary.num_requests < rule.min_answers:
        return Verdict(
            "roll_back",
            f"after {age_s:.0f} s only {canary.num_requests} of at least {rule.min_answers} requests have come",
        )
    is_due = canary.num_requests >= math.ceil(rule.num_answers * min(LOOKS, outcomes.num_looks + 1) / LOOKS)
    if not (is_due or is_timed_out):
        return WAIT
    outcomes.num_looks += 1
    if (reason := worse_by(canary, stable)) is not None:
        return Verdict("roll_back", reason)
    if canary.num_requests >= rule.num_answers or is_timed_out:
        return Verdict("promote", f"not worse over {canary.num_requests} requests, beside {stable.num_requests} others")
    return WAIT


def worse_by(canary: ArmOutcomes, stable: ArmOutcomes) -> str | None:
    """What shows that the canary is worse; None where nothing does."""
    if (p := reward_p_value(canary, stable)) is not None and p < LEVEL_OF_A_TEST:
        return f"its mean reward is {canary.mean:.4g} instead of {stable.mean:.4g} (p = {p:.2g})"
    p = error_p_value(canary, stable)
    if p is not None and p < LEVEL_OF_A_TEST:
        shares = [arm.num_errors / arm.num_requests for arm in (canary, stable)]
        return f"{shares[0]:.1%} of its requests failed instead of {shares[1]:.1%} (p = {p:.2g})"
    return None


def reward_p_value(canary: ArmOutcomes, stable: ArmOutcomes) -> float | None:
    """Of Welch's test that the canary's mean is not lower; None with fewer than two rewards in an arm."""
    if min(canary.num_rewards, stable.num_rewards) < 2:
        return None
    errors = [arm.variance / arm.num_rewards for arm in (canary, stable)]
    if sum(errors) == 0.0:
        return 0.0 if canary.mean < stable.mean else 1.0
    freedom = sum(errors) ** 2 / sum(
        error**2 / (arm.num_rewards - 1) for error, arm in zip(errors, (canary, stable), strict=True)
    )
    return float(stats.t.cdf((canary.mean - stable.mean) / math.sqrt(sum(errors)), freedom))


def error_p_value(canary: ArmOutcomes, stable: ArmOutcomes) -> float | None:
    """Of Fisher's test that the canary's errors are not more frequent; None without requests in an arm."""
    if min(canary.num_requests, stable.num_requests) == 0:
        return None
    table = np.array([[arm.num_errors, arm.num_answers] for arm in (canary, stable)])
    return float(stats.fisher_exact(table, alternative="greater").pvalue)
