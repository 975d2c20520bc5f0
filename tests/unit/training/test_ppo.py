from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trimtab_training.models import Vocabulary
from trimtab_training.objective_config import PpoConfig
from trimtab_training.objectives.action_space import WholeVocabulary
from trimtab_training.objectives.objective import ScoredRollout
from trimtab_training.objectives.ppo import Ppo, PpoInputs, ppo_loss
from trimtab_training.objectives.value_model import ValueModel
from trimtab_training.policy import TailoredPolicy
from trimtab_training.wiring import build_learner


@pytest.fixture
def policy(make_config: Any, vocabulary: Vocabulary) -> TailoredPolicy:
    learner, _ = build_learner(make_config(objective={"kind": "ppo"}), vocabulary, None)
    return learner.policy


def rollout(output: tuple[int, ...], reward: float, group: int = 0, **known: Any) -> ScoredRollout:
    return ScoredRollout((1, 2), output, reward, group, **known)


def objective(policy: TailoredPolicy, **settings: Any) -> Ppo:
    return Ppo(
        PpoConfig(**settings),
        value_model=ValueModel(policy.adapter),
        actions=WholeVocabulary(),
        prefix=(),
        seed=0,
    )


def column(ppo: Ppo, name: str, output: tuple[int, ...]) -> list[float]:
    (row,) = [row for row, found in enumerate(ppo._buffer.rollouts) if found.output_token_ids == output]
    return [float(value) for value in ppo._buffer.token_column(name, [row])[0]]


def backward(loss: torch.Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def test_a_ratio_beyond_the_clip_moves_the_policy_only_back() -> None:
    """Ratios 1.5, 1.5, 0.5, 0.5 with advantages 1, -1, 1, -1 and clip 0.2: min gives 1.2, -1.5, 0.5, -0.8. The gradient
    of -ρA for a log-probability is -ρA where ρ is not clipped, and 0 where it is."""
    logprobs = torch.tensor([1.5, 1.5, 0.5, 0.5]).log().requires_grad_()
    nothing = torch.zeros(4)
    inputs = PpoInputs(
        logprobs=logprobs,
        old_logprobs=nothing,
        advantages=torch.tensor([1.0, -1.0, 1.0, -1.0]),
        values=nothing,
        returns=nothing,
        entropy=nothing,
    )
    part = ppo_loss(inputs, PpoConfig(clip=0.2), kl=3.0)
    assert float(part.total.detach()) == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8))
    assert part.num_units == 4
    assert part.figures["kl"] == 3.0
    assert (part.figures["ratio"], part.figures["clipped"]) == pytest.approx((4.0, 4.0))
    backward(part.total)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([0.0, 1.5, -0.5, 0.0])


def test_the_value_error_costs_and_the_entropy_pays_what_the_configuration_says() -> None:
    nothing = torch.zeros(2)
    inputs = PpoInputs(
        logprobs=nothing,
        old_logprobs=nothing,
        advantages=nothing,
        values=torch.tensor([1.0, 2.0]),
        returns=torch.tensor([0.0, 5.0]),
        entropy=torch.tensor([0.5, 1.5]),
    )
    part = ppo_loss(inputs, PpoConfig(value_coef=0.5, entropy_coef=0.1), kl=0.0)
    assert float(part.total) == pytest.approx(0.5 * (1.0 + 9.0) - 0.1 * 2.0)  # squares of 1 and -3
    assert (part.figures["value_error"], part.figures["entropy"]) == pytest.approx((10.0, 2.0))


def test_right_after_the_draw_the_gradient_is_the_advantage_times_that_of_the_log_probability(
    policy: TailoredPolicy,
) -> None:
    """Values are 0 and gamma and lambda 1, so both tokens of an output have its reward as advantage: 1, 1 and 0, which
    normalise to a, a and -2a with a = 1/3 over their deviation, the root of 2/9."""
    ppo = objective(policy, kl_coef=0.0, gamma=1.0, gae_lambda=1.0)
    ppo.add([rollout((3, 4), 1.0), rollout((5,), 0.0)], policy)
    rows = ppo.next_rows(8)
    part = ppo.loss(policy, rows)
    assert part.figures["ratio"] == pytest.approx(3.0, rel=1e-4)
    backward(part.total)
    got = [parameter.grad.clone() for parameter in policy.adapter.parameters()]
    policy.adapter.zero_grad()
    a = (1 / 3) / (2 / 9) ** 0.5
    good, bad = (policy.forward([(1, 2)], [output], [()]).token_logprobs()[0].sum() for output in ((3, 4), (5,)))
    backward(2 * a * bad - a * good)
    for parameter, gradient in zip(policy.adapter.parameters(), got, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-5)  # the ratio is 1 but for rounding


def test_the_entropy_bonus_reaches_the_adapter(policy: TailoredPolicy) -> None:
    """Two configurations that differ by the weight 1 of the bonus have gradients that differ by that of -H."""
    rollouts = [rollout((3, 4), 1.0), rollout((5,), 0.0)]

    def gradients(entropy_coef: float) -> list[torch.Tensor]:
        ppo = objective(policy, kl_coef=0.0, entropy_coef=entropy_coef)
        ppo.add(rollouts, policy)
        policy.adapter.zero_grad()
        backward(ppo.loss(policy, ppo.next_rows(2)).total)
        return [parameter.grad.clone() for parameter in policy.adapter.parameters()]

    without, with_bonus = gradients(0.0), gradients(1.0)
    policy.adapter.zero_grad()
    for output in ((3, 4), (5,)):
        logits = policy.forward([(1, 2)], [output], [()]).steered_logits
        backward(-torch.distributions.Categorical(logits=logits).entropy().sum())  # type: ignore[no-untyped-call]
    for parameter, a, b in zip(policy.adapter.parameters(), with_bonus, without, strict=True):
        torch.testing.assert_close(a - b, parameter.grad, rtol=1e-3, atol=1e-4)


def test_the_log_ratio_to_the_base_costs_at_each_token(policy: TailoredPolicy) -> None:
    ppo = objective(policy, kl_coef=0.5, gamma=1.0, gae_lambda=1.0)
    known: Any = {"behaviour_logprobs": (-1.0, -2.0), "base_logprobs": (-2.0, -6.0)}
    figures = ppo.add([rollout((3, 4), 10.0, **known)], policy)
    # log-ratios 1 and 4: rewards -0.5 and 10 - 2, to come 7.5 and 8
    assert column(ppo, "return", (3, 4)) == pytest.approx([7.5, 8.0])
    assert figures["kl_per_token"] == pytest.approx(2.5)


def test_what_the_log_gave_is_penalised_as_the_policy_that_is_trained_has_it(policy: TailoredPolicy) -> None:
    """The value model begins at 0, so without discount a return is the reward less the weight times the log-ratio."""
    ppo = objective(policy, kl_coef=0.5, gamma=1.0, gae_lambda=1.0)
    known: Any = {"behaviour_logprobs": (-9.0,), "base_logprobs": (-1.0,), "is_current": False}
    ppo.add([rollout((3,), 1.0, **known)], policy)
    now = float(policy.forward([(1, 2)], [(3,)], [()]).token_logprobs()[0].detach().sum())
    assert column(ppo, "return", (3,)) == pytest.approx([1.0 - 0.5 * (now + 1.0)], rel=1e-4)
    assert column(ppo, "old_logprob", (3,)) == [-9.0]


def test_values_are_read_behind_prefix_and_prompt(policy: TailoredPolicy) -> None:
    ppo = Ppo(
        PpoConfig(kl_coef=0.0),
        value_model=ValueModel(policy.adapter),
        actions=WholeVocabulary(),
        prefix=(9, 8),
        seed=0,
    )
    torch.nn.init.normal_(ppo.value_model.head.weight, generator=torch.Generator().manual_seed(1))
    ppo.add([rollout((3, 4, 5), 1.0)], policy)
    values = np.subtract(column(ppo, "return", (3, 4, 5)), column(ppo, "advantage", (3, 4, 5)))
    (expected,) = ppo.value_model.values([(9, 8, 1, 2)], [(3, 4, 5)]).tolist()
    assert values.tolist() == pytest.approx(expected, abs=1e-5)
    assert len({round(value, 3) for value in expected}) == 3


def test_recorded_log_probabilities_are_the_old_ones(policy: TailoredPolicy) -> None:
    ppo = objective(policy, kl_coef=0.0)
    recorded: Any = {"behaviour_logprobs": (-0.25,), "base_logprobs": (-1.0,)}
    ppo.add([rollout((3,), 1.0, **recorded), rollout((4,), 0.0)], policy)
    assert column(ppo, "old_logprob", (3,)) == [-0.25]
    (own,) = policy.forward([(1, 2)], [(4,)], [()]).token_logprobs()[0].detach().flatten().tolist()
    assert column(ppo, "old_logprob", (4,)) == pytest.approx([own], rel=1e-5)


@pytest.mark.parametrize(("kl", "factor"), [(0.5, 1.02), (0.11, 1.01), (0.1, 1.0), (0.095, 0.995), (-3.0, 0.98)])
def test_the_kl_weight_follows_its_target_after_each_round(policy: TailoredPolicy, kl: float, factor: float) -> None:
    """Target 0.1: the factor is 1 + 0.1 * clip(kl / 0.1 - 1, ±0.2), so 1.02 and 0.98 at most."""
    ppo = objective(policy, kl_coef=0.4, kl_target=0.1)
    known: Any = {"behaviour_logprobs": (-1.0, -1.0), "base_logprobs": (-1.0, -1.0 - 2 * kl)}
    first = ppo.add([rollout((3, 4), 1.0, **known)], policy)
    assert first == pytest.approx({"kl_per_token": kl, "kl_coef": 0.4})
    second = ppo.add([rollout((3, 4), 1.0, **known)], policy)
    assert second["kl_coef"] == pytest.approx(0.4 * factor)
    assert ppo.describe() == pytest.approx({"kl_coef": 0.4 * factor * factor})


def test_an_empty_log_is_no_round(policy: TailoredPolicy) -> None:
    ppo = objective(policy, kl_coef=0.4, kl_target=0.1)
    assert ppo.add([], policy) == {}
    assert ppo.wants_round
    assert ppo.describe() == {"kl_coef": 0.4}


def test_advantages_are_normalised_over_the_rows_of_a_step_and_each_keeps_its_own(policy: TailoredPolicy) -> None:
    ppo = objective(policy, kl_coef=0.0, gamma=1.0, gae_lambda=1.0, epochs=1)
    ppo.add([rollout(tuple(range(3, 4 + i)), float(i), group=i) for i in range(5)], policy)
    steps = [ppo.next_rows(3), ppo.next_rows(3)]
    assert sorted(row.number for rows in steps for row in rows) == list(range(5))
    assert ppo.wants_round
    for rows in steps:
        tokens = np.concatenate([row.advantages for row in rows])
        assert (tokens.mean(), tokens.std()) == pytest.approx((0.0, 1.0), abs=1e-6)
        rewards = [ppo._buffer.rollouts[row.number].reward for row in rows]
        assert np.argsort(rewards).tolist() == np.argsort([row.advantages[0] for row in rows]).tolist()


@pytest.mark.parametrize(("kind", "ratios"), [("ppo", 5), ("rloo", 2)])
def test_dropout_does_not_move_the_ratios(
    make_config: Any, vocabulary: Vocabulary, model_dirs: dict[str, Path], kind: str, ratios: int
) -> None:
    """GPT-2 comes with dropout, and a step trains: each of 5 tokens or 2 outputs has the ratio 1 all the same."""
    config = make_config(
        models={"adapter": str(model_dirs["gpt2"])}, objective={"kind": kind}, fresh={"num_per_prompt": 2}
    )
    learner, _ = build_learner(config, vocabulary, None)
    learner.add_rollouts([rollout((3, 4, 5), 1.0), rollout((6, 7), 0.0)])
    metrics = learner.train_step()
    assert metrics.num_units == ratios
    assert metrics.figures["ratio"] == pytest.approx(1.0, rel=1e-4)
    assert learner.policy.adapter.training


def test_the_value_model_learns_what_is_to_come(make_config: Any, vocabulary: Vocabulary) -> None:
    """The same outputs with the same rewards every round: the error of the values falls to a tenth in 40 steps.

    Without its parameters among the trained ones it stays; deterministic.
    """
    config = make_config(
        objective={"kind": "ppo", "kl_coef": 0.0, "gamma": 1.0, "gae_lambda": 1.0, "epochs": 5},
        optimiser={"batch_size": 8, "lr": 5e-3, "decay": "none"},
    )
    learner, _ = build_learner(config, vocabulary, None)
    errors = []
    for _ in range(8):
        learner.add_rollouts([rollout((3 + i, 4), float(i % 2) + 1.0, group=i) for i in range(8)])
        errors += [learner.train_step().figures["value_error"] for _ in range(5)]
    assert errors[0] == pytest.approx(2.5)  # rewards 1 and 2 from 0: (1 + 4) / 2
    assert errors[-1] < 0.25


def test_a_restored_objective_goes_on_as_if_nothing_had_happened(policy: TailoredPolicy) -> None:
    settings: Any = {"epochs": 3, "kl_target": 0.2}
    first, second = objective(policy, **settings), objective(policy, **settings)
    torch.nn.init.normal_(first.value_model.head.weight)
    first.add([rollout((3 + i, *range(9, 9 + i % 3)), float(i), group=i // 3) for i in range(9)], policy)
    first.next_rows(4)
    second.load_state(first.state())
    assert second.describe() == first.describe()
    while not first.wants_round:
        rows, others = first.next_rows(2), second.next_rows(2)
        assert [row.number for row in others] == [row.number for row in rows]
        assert all(np.array_equal(a.advantages, b.advantages) for a, b in zip(rows, others, strict=True))
        expected, got = first.loss(policy, rows), second.loss(policy, others)
        assert float(got.total.detach()) == float(expected.total.detach())
        assert got.figures == expected.figures
    assert second.wants_round
