import math
from typing import Any

import numpy as np
import pytest
import torch

from trimtab_training.models import Vocabulary
from trimtab_training.objective_config import RlooConfig, VbonConfig
from trimtab_training.objectives.objective import ScoredRollout
from trimtab_training.objectives.rloo import Rloo, leave_one_out
from trimtab_training.policy import TailoredPolicy
from trimtab_training.wiring import build_learner


def test_a_baseline_is_the_mean_of_the_others_for_the_same_prompt() -> None:
    returns = np.array([1.0, 4.0, 10.0, 7.0, 5.0])
    groups = np.array([0, 1, 0, 0, 1])
    # group 0: 1, 10, 7 with baselines 8.5, 4, 5.5; group 1: 4, 5 with baselines 5, 4
    assert leave_one_out(returns, groups).tolist() == [-7.5, -1.0, 6.0, 1.5, 1.0]
    assert math.isnan(leave_one_out(np.array([1.0, 2.0, 3.0]), np.array([0, 1, 0]))[1])


@pytest.fixture
def policy(make_config: Any, vocabulary: Vocabulary) -> TailoredPolicy:
    learner, _ = build_learner(make_config(), vocabulary, None)
    return learner.policy


def rollout(output: tuple[int, ...], reward: float, group: int = 0, **known: Any) -> ScoredRollout:
    return ScoredRollout((1, 2), output, reward, group, **known)


def objective(**settings: Any) -> Rloo:
    return Rloo(RlooConfig(**settings), prefix=(), seed=0)


def test_the_gradient_is_the_advantage_times_that_of_the_log_probability(policy: TailoredPolicy) -> None:
    rloo = objective(kl_coef=0.0)
    pair = [rollout((3, 4), 1.0), rollout((5,), 0.0)]
    rloo.add(pair, policy)
    rloo.loss(policy, [0, 1]).total.backward()  # type: ignore[no-untyped-call]
    got = [parameter.grad.clone() for parameter in policy.adapter.parameters()]
    policy.adapter.zero_grad()
    # advantages of rewards 1 and 0 in one group are 1 and -1
    good, bad = (policy.forward([(1, 2)], [r.output_token_ids], [()]).token_logprobs()[0].sum() for r in pair)
    (bad - good).backward()  # type: ignore[no-untyped-call]
    for parameter, gradient in zip(policy.adapter.parameters(), got, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-5)  # the ratio is 1 but for rounding


def test_the_kl_penalty_lowers_the_return_by_the_log_ratio_of_the_whole_output(policy: TailoredPolicy) -> None:
    rloo = objective(kl_coef=0.5)
    known: Any = {"behaviour_logprobs": (-1.0, -2.0), "base_logprobs": (-2.0, -3.0)}  # log-ratio 2: return 1 - 1 = 0
    none: Any = {"behaviour_logprobs": (-1.0,), "base_logprobs": (-1.0,)}
    figures = rloo.add([rollout((3, 4), 1.0, **known), rollout((5,), 0.25, **none)], policy)
    rows = {rloo._buffer.rollouts[row].output_token_ids: row for row in (0, 1)}
    assert rloo._buffer.column("advantage")[rows[(3, 4)]] == pytest.approx(-0.25)
    assert figures["kl_per_output"] == pytest.approx(1.0)


def test_the_kl_penalty_of_a_logged_output_is_of_the_policy_that_is_trained(policy: TailoredPolicy) -> None:
    """Drawn from the base, its own log-ratio is 0; what counts is that of the policy, whatever drew the output."""
    rloo = objective(kl_coef=0.5)
    with torch.no_grad():
        output = policy.forward([(1, 2)] * 2, [(3, 4), (5, 6)], [()] * 2)
    steered, base = (logprobs.sum(dim=-1).tolist() for logprobs in output.token_logprobs())
    logged: Any = {"behaviour_logprobs": (-1.0, -2.0), "base_logprobs": (-1.0, -2.0), "is_current": False}
    figures = rloo.add([rollout((3, 4), 1.0, **logged), rollout((5, 6), 0.25)], policy)
    rows = {rloo._buffer.rollouts[row].output_token_ids: row for row in (0, 1)}
    kl = [steered[0] + 3.0, steered[1] - base[1]]  # the second was not recorded, so it was just drawn
    expected = (1.0 - 0.5 * kl[0]) - (0.25 - 0.5 * kl[1])
    assert abs(steered[0] + 3.0) > 0.1
    assert rloo._buffer.column("advantage")[rows[(3, 4)]] == pytest.approx(expected, rel=1e-4)
    assert figures["kl_per_output"] == pytest.approx(sum(kl) / 2, rel=1e-4)
    assert rloo._buffer.rollouts[rows[(3, 4)]].behaviour_logprobs == (-1.0, -2.0)  # what the weights are made of


def test_an_importance_weight_is_capped_and_one_right_after_the_draw(policy: TailoredPolicy) -> None:
    fresh = objective(kl_coef=0.0)
    fresh.add([rollout((3, 4), 1.0), rollout((5,), 0.0)], policy)
    assert fresh.loss(policy, [0]).figures["ratio"] == pytest.approx(1.0, rel=1e-4)
    stale = objective(kl_coef=0.0, max_ratio=1.5)
    unlikely: Any = {"behaviour_logprobs": (-50.0,), "base_logprobs": (-1.0,)}
    likely: Any = {"behaviour_logprobs": (-1.0,), "base_logprobs": (-1.0,)}
    stale.add([rollout((3,), 1.0, **unlikely), rollout((5,), 0.0, **likely)], policy)
    part = stale.loss(policy, [0])
    logprob = float(policy.forward([(1, 2)], [(3,)], [()]).token_logprobs()[0].detach().sum())
    assert float(part.total.detach()) == pytest.approx(-1.5 * 1.0 * logprob, rel=1e-4)


def test_a_round_is_gone_through_as_often_as_asked_and_single_outputs_are_left_out(policy: TailoredPolicy) -> None:
    rloo = objective(epochs=2)
    assert rloo.wants_round
    rounds = [rollout((3,), 1.0), rollout((4,), 0.0), rollout((5,), 0.0, group=1)]
    assert rloo.add(rounds, policy)["num_without_baseline"] == 1.0
    drawn = [list(rloo.next_rows(8)), list(rloo.next_rows(8))]
    assert [sorted(rows) for rows in drawn] == [[0, 1], [0, 1]]
    assert rloo.wants_round


def test_a_restored_objective_goes_on_as_if_nothing_had_happened(policy: TailoredPolicy) -> None:
    first, second = objective(epochs=3), objective(epochs=3)
    first.add([rollout((3 + i,), float(i), group=i // 3) for i in range(9)], policy)
    first.next_rows(4)
    second.load_state(first.state())
    while not first.wants_round:
        rows = first.next_rows(2)
        assert second.next_rows(2) == rows
        expected, got = first.loss(policy, rows), second.loss(policy, rows)
        assert float(got.total.detach()) == pytest.approx(float(expected.total.detach()), rel=1e-6)
    assert second.wants_round


def test_best_of_n_is_the_optimum_of_its_distillation() -> None:
    assert VbonConfig(n=8).kl_coef == pytest.approx(1 / 7)
    assert Rloo(VbonConfig(), prefix=(3,), seed=0).name == "vbon"
