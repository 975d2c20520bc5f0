from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from typing_extensions import override

from trimtab_adapters.contract.errors import WeightsError
from trimtab_training.config import OptimiserConfig
from trimtab_training.learner import Learner, learning_rate
from trimtab_training.models import Vocabulary
from trimtab_training.objectives.objective import ScoredRollout
from trimtab_training.policy import TailoredPolicy
from trimtab_training.wiring import build_learner

ITEM = ScoredRollout((1, 2), (3, 4, 5), 1.0, group=0)


def learner(make_config: Any, vocabulary: Vocabulary, **optimiser: Any) -> Learner:
    built, _ = build_learner(make_config(optimiser={"batch_size": 2, **optimiser}), vocabulary, None)
    built.add_rollouts([ITEM])
    return built


def test_the_learning_rate_rises_over_the_warm_up_and_falls_to_zero_at_the_end() -> None:
    # warm-up 4: 1/4 2/4 3/4 4/4 of the peak; then (10 - step) / 6 of it
    config = OptimiserConfig(lr=12.0, warmup_steps=4)
    rates = [learning_rate(config, step, 10) for step in range(10)]
    assert rates == pytest.approx([3, 6, 9, 12, 12, 10, 8, 6, 4, 2])
    flat = OptimiserConfig(lr=12.0, warmup_steps=2, decay="none")
    assert [learning_rate(flat, step, 4) for step in range(4)] == [6, 12, 12, 12]


def test_accumulated_batches_count_as_their_mean(make_config: Any, vocabulary: Vocabulary) -> None:
    once = learner(make_config, vocabulary).train_step()
    thrice = learner(make_config, vocabulary, grad_accumulation=3).train_step()
    assert thrice.grad_norm == pytest.approx(once.grad_norm, rel=1e-5)
    assert (thrice.loss, thrice.figures["kl"]) == pytest.approx((once.loss, once.figures["kl"]), rel=1e-5)
    assert (once.num_units, thrice.num_units) == (6, 18)


def test_a_limit_on_the_gradient_is_applied_and_the_true_norm_reported(
    make_config: Any, vocabulary: Vocabulary
) -> None:
    limited = learner(make_config, vocabulary, max_grad_norm=1e-3)
    metrics = limited.train_step()
    assert metrics.grad_norm > 1e-2
    gradients = [parameter.grad for parameter in limited.policy.adapter.parameters() if parameter.grad is not None]
    assert sum(float(gradient.square().sum()) for gradient in gradients) ** 0.5 == pytest.approx(1e-3, rel=1e-3)


def test_only_the_adapter_is_trained(make_config: Any, vocabulary: Vocabulary) -> None:
    trained = learner(make_config, vocabulary)
    base = {name: tensor.clone() for name, tensor in trained.policy.base.state_dict().items()}
    adapter = {name: tensor.clone() for name, tensor in trained.policy.adapter.state_dict().items()}
    trained.train_step()
    assert all(bool((tensor == base[name]).all()) for name, tensor in trained.policy.base.state_dict().items())
    assert any(bool((tensor != adapter[name]).any()) for name, tensor in trained.policy.adapter.state_dict().items())
    assert not any(parameter.requires_grad for parameter in trained.policy.base.parameters())


def test_a_scaled_start_begins_close_to_the_base(make_config: Any, vocabulary: Vocabulary) -> None:
    row = ([ITEM.prompt_token_ids], [ITEM.output_token_ids], [()])
    kl = {}
    for scale in (1.0, 0.01):
        built, _ = build_learner(make_config(models={"start_scale": scale}), vocabulary, None)
        kl[scale] = float(built.policy.forward(*row).kl().detach().max())
    # For a small change of the logits KL is half their variance, so a hundredth of it costs 1e-4 of the KL; the full
    # change is not small, which is why there is a factor of 10 to spare.
    assert kl[1.0] > 0.05
    assert kl[0.01] < 1e-3 * kl[1.0]


def test_another_policy_may_put_base_and_adapter_together(make_config: Any, vocabulary: Vocabulary) -> None:
    class AdapterAlone(TailoredPolicy):
        @override
        def steer(self, base_logits: Any, adapter_logits: Any) -> Any:
            return adapter_logits[..., : self.num_known].float()

    built, _ = build_learner(make_config(), vocabulary, None, build_policy=AdapterAlone)
    output = built.policy.forward([(1, 2)], [(3,)], [()])
    with torch.no_grad():
        own = built.policy.adapter(input_ids=torch.tensor([[1, 2]])).logits[0, -1, : built.policy.num_known]
    assert torch.allclose(output.steered_logits[0, 0], own, atol=1e-5)


def test_each_quantile_is_trained_under_its_own_control_token(make_config: Any, vocabulary: Vocabulary) -> None:
    config = make_config(objective={"num_bins": 2}, optimiser={"batch_size": 1})
    built, _ = build_learner(config, vocabulary, None)
    good, bad = ScoredRollout((1,), (9,), 1.0, group=0), ScoredRollout((2,), (10,), 0.0, group=1)
    built.add_rollouts([good, bad])
    seen: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    forward = built.policy.forward

    def watch(prompts: Any, outputs: Any, prefixes: Any) -> Any:
        seen.extend((tuple(output), tuple(prefix)) for output, prefix in zip(outputs, prefixes, strict=True))
        return forward(prompts, outputs, prefixes)

    built.policy.forward = watch  # type: ignore[method-assign, assignment]
    built.train_step()
    built.train_step()
    assert sorted(seen) == [((9,), (64,)), ((10,), (65,))]
    assert built.objective.prefix == (64,)


def test_a_step_that_diverges_is_not_taken(make_config: Any, vocabulary: Vocabulary) -> None:
    built = learner(make_config, vocabulary)
    built.policy.alpha = float("inf")
    before = {name: tensor.clone() for name, tensor in built.policy.adapter.state_dict().items()}
    with pytest.raises(WeightsError, match="step 0"):
        built.train_step()
    assert built.step == 0
    assert all(bool((tensor == before[name]).all()) for name, tensor in built.policy.adapter.state_dict().items())


class Share:
    """One of two processes, run one after the other: what each adds up is kept, and the second sees the sums."""

    num = 2

    def __init__(self, rank: int, figures: dict[str, float], tensors: list[torch.Tensor]) -> None:
        self.rank = rank
        self._figures = figures
        self._tensors = tensors

    def add_up(self, figures: Mapping[str, float]) -> dict[str, float]:
        for name, value in figures.items():
            self._figures[name] = self._figures.get(name, 0.0) + value
        return dict(self._figures)

    def add_up_tensors(self, tensors: Sequence[torch.Tensor]) -> None:
        if self.rank == 0:
            self._tensors.extend(tensor.clone() for tensor in tensors)
        for mine, others in zip(tensors, self._tensors, strict=True):
            if self.rank == 1:
                mine.add_(others)

    def from_first(self, value: Any) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize(
    "objective",
    [
        {"kind": "quark"},
        {"kind": "rloo"},
        {"kind": "ppo", "entropy_coef": 0.1},
        {"kind": "nlpo", "mask_top_p": 0.5, "mask_min_tokens": 3},
        {"kind": "bonbon", "n": 2},
    ],
    ids=lambda objective: str(objective["kind"]),
)
def test_two_processes_take_the_step_that_one_takes(
    make_config: Any, vocabulary: Vocabulary, objective: dict[str, Any]
) -> None:
    """The second process ends with the sum of both gradients; its step must be the single process's."""
    rollouts = [ScoredRollout((1, 2 + i // 2), tuple(range(3, 5 + i)), float(i), group=i // 2) for i in range(10)]
    config = make_config(
        objective=objective, fresh={"num_per_prompt": 2}, optimiser={"batch_size": 2, "grad_accumulation": 3}
    )
    alone, _ = build_learner(config, vocabulary, None)
    alone.add_rollouts(rollouts)
    expected = alone.train_step()
    figures: dict[str, float] = {}
    tensors: list[torch.Tensor] = []
    for rank in (0, 1):
        built, _ = build_learner(config, vocabulary, None)
        shared = Learner(
            built.policy,
            built.objective,
            optimiser=config.optimiser,
            num_steps=10,
            processes=Share(rank, figures, tensors),
        )
        shared.add_rollouts(rollouts)
        metrics = shared.train_step()
    assert metrics.num_units == expected.num_units
    assert (metrics.loss, metrics.grad_norm) == pytest.approx((expected.loss, expected.grad_norm), rel=1e-4)
    # `abs` for the policy loss: normalised advantages sum to 0
    assert metrics.figures == pytest.approx(dict(expected.figures), rel=1e-4, abs=1e-6)


def test_how_the_models_are_computed_with_is_a_matter_of_the_configuration(
    make_config: Any, vocabulary: Vocabulary
) -> None:
    """Packing, a cache of the base's logits and checkpointing give the step that padding gives."""
    rollouts = [ScoredRollout((1, 2), tuple(range(3, 5 + i)), float(i), group=i) for i in range(5)]
    metrics = []
    for models in ({}, {"pack_tokens": 64, "base_cache_gib": 0.1, "gradient_checkpointing": True}):
        built, _ = build_learner(make_config(models=models, optimiser={"batch_size": 5}), vocabulary, None)
        built.add_rollouts(rollouts)
        metrics.append([built.train_step().flat() for _ in range(3)])
    plain, changed = metrics
    for expected, got in zip(plain, changed, strict=True):
        assert got == pytest.approx(expected, rel=1e-3)
    assert built.policy.adapter.is_gradient_checkpointing
