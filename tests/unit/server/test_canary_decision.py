"""When a canary is promoted, rolled back, or watched on."""

import math

import numpy as np
import pytest
from scipy import stats

from trimtab_server.canary.decision import (
    LEVEL_OF_A_TEST,
    LOOKS,
    CanaryRule,
    decide,
    error_p_value,
    reward_p_value,
)
from trimtab_server.canary.outcomes import ArmOutcomes, CanaryOutcomes
from trimtab_server.canary.split import takes_canary

RULE = CanaryRule(num_answers=40, min_answers=10, timeout_s=600.0)


def arm(rewards: list[float] | None = None, *, answers: int = 0, errors: int = 0) -> ArmOutcomes:
    """An arm with these rewards, or with answers without any."""
    made = ArmOutcomes()
    for reward in rewards if rewards is not None else [None] * answers:
        made.answered(reward)
    for _ in range(errors):
        made.failed()
    return made


def test_the_running_sums_are_the_means_and_variances() -> None:
    values = [1e9 + value for value in (1.0, 4.0, 2.0, 9.0)]  # where a difference of squares loses every digit
    made = arm(values)
    assert (made.num_answers, made.num_rewards, made.num_requests) == (4, 4, 4)
    assert made.mean == pytest.approx(1e9 + 4.0, rel=1e-15)
    assert made.variance == pytest.approx(np.var([1.0, 4.0, 2.0, 9.0], ddof=1), rel=1e-6)
    assert arm([1.0]).variance == 0.0


def test_answers_without_a_reward_and_errors_are_no_rewards() -> None:
    made = arm([0.5])
    made.answered(None)
    made.answered(math.nan)
    made.failed()
    assert (made.num_answers, made.num_errors, made.num_rewards, made.mean) == (3, 1, 1, 0.5)
    assert arm(answers=2).to_json() == {"num_answers": 2, "num_errors": 0, "num_rewards": 0, "mean_reward": None}


def test_the_p_values_are_welchs_and_fishers() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(0.0, 1.0, 30), rng.normal(0.4, 2.0, 50)
    expected = stats.ttest_ind(first, second, equal_var=False, alternative="less").pvalue
    assert reward_p_value(arm(first.tolist()), arm(second.tolist())) == pytest.approx(expected)
    # 3 of 4 against 1 of 6: C(4,3) C(6,1) + C(4,4) C(6,0) of C(10,4) ways have as many of four errors in the first
    assert error_p_value(arm(answers=1, errors=3), arm(answers=5, errors=1)) == pytest.approx((4 * 6 + 1) / 210)


def test_without_enough_there_is_no_p_value() -> None:
    assert reward_p_value(arm([1.0]), arm([1.0, 2.0])) is None
    assert error_p_value(arm(), arm(answers=3)) is None


def test_rewards_that_never_change_are_compared_as_they_are() -> None:
    assert reward_p_value(arm([0.0] * 3), arm([1.0] * 3)) == 0.0
    assert reward_p_value(arm([1.0] * 3), arm([1.0] * 3)) == 1.0


def test_a_canary_that_is_as_good_is_promoted_after_its_answers() -> None:
    outcomes = CanaryOutcomes()
    found = []
    for i in range(40):
        outcomes.canary.answered(float(i % 2))
        outcomes.stable.answered(float(i % 2))
        found.append(decide(outcomes, RULE, 1.0).action)
    assert found == ["wait"] * 39 + ["promote"]
    assert outcomes.num_looks == LOOKS


def test_a_canary_that_is_worse_is_rolled_back_at_the_next_look() -> None:
    outcomes = CanaryOutcomes(stable=arm([1.0, 2.0] * 50))
    found = []
    for i in range(10):
        outcomes.canary.answered(float(i % 2))
        found.append(decide(outcomes, RULE, 1.0))
    assert [verdict.action for verdict in found] == ["wait"] * 9 + ["roll_back"]
    assert "mean reward is 0.5 instead of 1.5" in found[-1].reason


def test_a_canary_that_fails_more_is_rolled_back_whatever_its_rewards() -> None:
    outcomes = CanaryOutcomes(canary=arm([9.0] * 4, errors=6), stable=arm([0.0, 1.0] * 50))
    verdict = decide(outcomes, RULE, 1.0)
    assert verdict.action == "roll_back"
    assert "60.0% of its requests failed instead of 0.0%" in verdict.reason


def test_a_canary_without_an_arm_beside_it_is_promoted_by_its_answers_alone() -> None:
    """Every request came to lie in the canary: nothing shows it to be worse."""
    assert decide(CanaryOutcomes(canary=arm(answers=40)), RULE, 1.0).action == "promote"


def test_time_ends_a_canary_in_any_case() -> None:
    few = CanaryOutcomes(canary=arm(answers=9), stable=arm(answers=100))
    assert decide(few, RULE, 599.0).action == "wait"
    verdict = decide(few, RULE, 600.0)
    assert (verdict.action, verdict.reason) == (
        "roll_back",
        "after 600 s only 9 of at least 10 requests have come",
    )
    assert decide(CanaryOutcomes(canary=arm(answers=10), num_looks=1), RULE, 600.0).action == "promote"
    worse = CanaryOutcomes(canary=arm([0.0, 0.1] * 6), stable=arm([1.0, 1.1] * 20), num_looks=1)
    assert decide(worse, RULE, 600.0).action == "roll_back"


def test_a_canary_that_is_as_good_is_seldom_rolled_back() -> None:
    """2,000 canaries of 40 normal rewards beside 360, each looked at after every answer.

    At most 5 % may be rolled back (Bonferroni over looks and tests), and of the tests only that of rewards can: at most
    4 looks at 0.5 %, so 2 %. More than 62 of 2,000 at 2 % (deviation 6.3) have odds of about 1 in 3,000.
    """
    rng = np.random.default_rng(5)
    num_rolled_back = 0
    for _ in range(2000):
        outcomes = CanaryOutcomes(stable=arm(rng.normal(size=360).tolist()))
        for reward in rng.normal(size=40):
            outcomes.canary.answered(float(reward))
            action = decide(outcomes, RULE, 1.0).action
            if action != "wait":
                num_rolled_back += action == "roll_back"
                break
        else:
            pytest.fail("a canary did not end")
    assert num_rolled_back <= 62
    assert num_rolled_back > 0, "the looks never reject, so they test nothing"
    assert pytest.approx(0.005) == LEVEL_OF_A_TEST


def test_the_split_takes_its_share_and_the_same_requests_again() -> None:
    """10,000 keys at 10 %: deviation 30, so 5 of them are odds of 1 in 1,700,000."""
    keys = [f"req-{i}" for i in range(10_000)]
    taken = [takes_canary("kind", 3, key, 10.0) for key in keys]
    assert abs(sum(taken) - 1000) < 150
    assert taken == [takes_canary("kind", 3, key, 10.0) for key in keys]
    again = [takes_canary("kind", 4, key, 10.0) for key in keys]
    both = sum(a and b for a, b in zip(taken, again, strict=True))
    assert both < 200, "another revision draws anew: 100 in both are expected, deviation 10"
    wider = [takes_canary("kind", 3, key, 20.0) for key in keys]
    assert all(w for t, w in zip(taken, wider, strict=True) if t), "a larger share keeps those of the smaller one"
