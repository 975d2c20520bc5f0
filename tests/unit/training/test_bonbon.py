from typing import Any

import numpy as np
import pytest
import torch

from trimtab_training.models import Vocabulary
from trimtab_training.objective_config import BonbonConfig
from trimtab_training.objectives.bonbon import Bonbon, bonbon_loss, log_ratio_difference
from trimtab_training.objectives.objective import ScoredRollout
from trimtab_training.objectives.pair_pool import Pair
from trimtab_training.policy import TailoredPolicy
from trimtab_training.wiring import build_learner


@pytest.fixture
def policy(make_config: Any, vocabulary: Vocabulary) -> TailoredPolicy:
    config = make_config(objective={"kind": "bonbon", "n": 2}, fresh={"num_per_prompt": 2})
    return build_learner(config, vocabulary, None)[0].policy


def objective(**settings: Any) -> Bonbon:
    return Bonbon(BonbonConfig(**{"n": 3, **settings}), prefix=(), seed=0)


def rollout(output: tuple[int, ...], reward: float, group: int = 0) -> ScoredRollout:
    return ScoredRollout((1, 2 + group), output, reward, group)


@pytest.mark.parametrize(("n", "beta"), [(2, 0.5), (4, 0.0909091), (8, 0.0275482094), (16, 0.0100455)])
def test_half_the_reciprocal_is_the_papers_beta(n: int, beta: float) -> None:
    assert 0.5 / log_ratio_difference(n) == pytest.approx(beta, rel=1e-5)


@pytest.mark.parametrize("n", [2, 5, 8])
def test_it_is_what_best_of_n_itself_has(n: int) -> None:
    """With continuous rewards best-of-n has the density n u^(n-1) over the rank u, so the difference is (n - 1) times
    E[log best rank] - E[log worst rank]; the ranks' densities are n u^(n-1) and n (1 - u)^(n-1). Midpoint sums."""
    u = (np.arange(2_000_000) + 0.5) / 2_000_000
    best, worst = (n * u ** (n - 1) * np.log(u)).mean(), (n * (1 - u) ** (n - 1) * np.log(u)).mean()
    assert (n - 1) * (best - worst) == pytest.approx(log_ratio_difference(n), rel=1e-4)


def test_the_loss_weighs_likelihood_and_preference() -> None:
    # n = 3: 2 * (1 + 1/2) = 3; preferences (1 - 3)² and (4 - 3)²
    part = bonbon_loss(torch.tensor([-2.0, -6.0]), torch.tensor([1.0, 4.0]), n=3, likelihood_weight=0.1)
    assert float(part.total) == pytest.approx(0.1 * 8.0 + 0.9 * 5.0)
    assert part.num_units == 2
    assert part.figures == pytest.approx({"nll": 8.0, "preference": 5.0, "log_ratio_difference": 5.0})


def test_the_log_ratios_are_those_of_whole_outputs_to_the_base(policy: TailoredPolicy) -> None:
    pairs = [Pair((1, 2), (3, 4, 5), (6,)), Pair((7,), (8,), (9, 10))]
    part = objective().loss(policy, pairs)
    expected = []
    for pair in pairs:
        ratios = []
        for output in (pair.best_token_ids, pair.worst_token_ids):
            steered, base = policy.forward([pair.prompt_token_ids], [output], [()]).token_logprobs()
            ratios.append(float((steered - base).sum().detach()))
        expected.append(ratios[0] - ratios[1])
    assert part.figures["log_ratio_difference"] == pytest.approx(sum(expected), abs=1e-4)
    assert part.figures["preference"] == pytest.approx(sum((h - 3.0) ** 2 for h in expected), rel=1e-4)


def test_the_gradient_draws_best_and_worst_apart_until_the_difference_is_reached(policy: TailoredPolicy) -> None:
    """60 steps of descent on one pair without the likelihood; deterministic."""
    bonbon = objective(likelihood_weight=0.0)
    bonbon.add([rollout((3, 4), 1.0), rollout((5, 6), 0.5), rollout((7,), 0.0)], policy)
    optimiser = torch.optim.Adam(policy.adapter.parameters(), lr=2e-2)
    for _ in range(60):
        optimiser.zero_grad()
        part = bonbon.loss(policy, bonbon.next_rows(1))
        part.total.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    assert part.figures["log_ratio_difference"] == pytest.approx(3.0, abs=0.05)
    with torch.no_grad():
        steered, base = policy.forward([(1, 2)] * 2, [(3, 4), (7,)], [()] * 2).token_logprobs()
    best, worst = (steered - base).sum(dim=-1).tolist()
    assert best - worst == pytest.approx(3.0, abs=0.1)


def test_a_prompt_gives_its_best_and_worst_and_ties_and_incomplete_ones_are_counted(policy: TailoredPolicy) -> None:
    bonbon = objective()
    figures = bonbon.add(
        [
            *(rollout((3 + i,), reward) for i, reward in enumerate([1.0, 5.0, -2.0])),
            *(rollout((13 + i,), reward, group=1) for i, reward in enumerate([2.0, 2.0, 2.0])),
            *(rollout((23 + i,), reward, group=2) for i, reward in enumerate([2.0, 3.0])),
            *(rollout((33 + i,), reward, group=3) for i, reward in enumerate([4.0, 4.0, 0.0])),
        ],
        policy,
    )
    assert figures == {"num_pairs": 2.0, "num_ties": 1.0, "num_incomplete": 1.0}
    assert bonbon.num_rollouts == 4
    pairs = {pair.prompt_token_ids: (pair.best_token_ids, pair.worst_token_ids) for pair in bonbon.next_rows(2)}
    assert pairs == {(1, 2): ((4,), (5,)), (1, 5): ((33,), (35,))}


def test_the_pool_is_gone_through_in_passes_and_grows(policy: TailoredPolicy) -> None:
    bonbon = objective()
    for group in range(5):
        bonbon.add([rollout((3 + i,), float(i), group=group) for i in range(3)], policy)
    assert not bonbon.wants_round
    drawn = [pair.prompt_token_ids[1] for _ in range(5) for pair in bonbon.next_rows(2)]
    assert sorted(drawn[:5]) == sorted(drawn[5:]) == [2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match="empty"):
        objective().next_rows(1)


def test_a_restored_objective_goes_on_as_if_nothing_had_happened(policy: TailoredPolicy) -> None:
    first, second = objective(), objective()
    for bonbon_round in range(2):
        groups = range(5 * bonbon_round, 5 * bonbon_round + 5)
        first.add([rollout((3 + i,), float(i), group=group) for group in groups for i in range(3)], policy)
        first.next_rows(3)
    second.load_state(first.state())
    assert second.num_rollouts == first.num_rollouts == 20
    assert [first.next_rows(4) for _ in range(9)] == [second.next_rows(4) for _ in range(9)]
