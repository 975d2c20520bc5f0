"""Each operator alone, against its definition; guidance against transformers' own."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

from trimtab_adapters import operators
from trimtab_adapters.contract.params import AlphaSchedule, SteeringOperators, SteeringRequest


def logits(num_rows: int, width: int = 50, seed: int = 0, spread: float = 3.0) -> Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed)) * spread


def kl(steered: Tensor, base: Tensor) -> Tensor:
    steered, base = torch.log_softmax(steered.double(), -1), torch.log_softmax(base.double(), -1)
    return (steered.exp() * torch.where(torch.isneginf(steered), 0.0, steered - base)).sum(-1)


def bisected(base: Tensor, added: Tensor, cap: float) -> float:
    """The scale of one row by a hundred bisections in float64."""
    low, high = 0.0, 1.0
    if float(kl(base.double() + added.double(), base)) <= cap:
        return 1.0
    for _ in range(100):
        middle = (low + high) / 2
        fits = float(kl(base.double() + middle * added.double(), base)) <= cap
        low, high = (middle, high) if fits else (low, middle)
    return low


@pytest.mark.parametrize("cap", [1e-3, 0.02, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("spread", [0.3, 3.0, 12.0])
def test_the_capped_scale_is_the_largest_that_fits(cap: float, spread: float) -> None:
    base, added = logits(40, seed=1), logits(40, seed=2, spread=spread)
    base[:20, 30:] = -math.inf  # as a grammar mask would
    caps = torch.full((40, 1), cap)
    scale = operators.capped_scale(base, added, caps)
    reached = kl(base.double() + scale.double() * added.double(), base)
    for row in range(40):
        if bisected(base[row], added[row], cap) == 1.0:
            assert float(scale[row]) == 1.0
            continue
        # 1e-5 nats is what float32 resolves of a difference of two normalisers.
        assert float(reached[row]) <= cap + 1e-5
        assert float(reached[row]) >= cap * 0.998 - 1e-5


def test_rows_without_a_cap_are_left_alone() -> None:
    base, added = logits(3, seed=1), logits(3, seed=2)
    caps = torch.tensor([[math.inf], [0.01], [math.inf]])
    scale = operators.capped_scale(base, added, caps)[:, 0].tolist()
    assert scale[0] == scale[2] == 1.0
    assert 0.0 < scale[1] < 1.0


def test_a_step_that_changes_nothing_needs_no_cap() -> None:
    base = logits(2)
    constant = torch.full_like(base, 7.0)  # softmax does not see it
    assert operators.capped_scale(base, constant, torch.full((2, 1), 1e-4)).tolist() == [[1.0], [1.0]]


def test_a_masked_peak_does_not_disturb_the_search() -> None:
    base = torch.tensor([[0.0, -math.inf, -1.0]])
    added = torch.tensor([[0.0, 50.0, 9.0]])
    scale = operators.capped_scale(base, added, torch.tensor([[0.1]]))
    assert float(scale) == pytest.approx(bisected(base[0], added[0], 0.1), rel=5e-3)


def test_implausible_tokens_are_those_below_a_fraction_of_the_largest() -> None:
    probabilities = torch.tensor([[0.5, 0.25, 0.2, 0.05], [0.97, 0.01, 0.01, 0.01]])
    out = operators.implausible(probabilities.log() + 3.0, torch.tensor([[0.45], [0.0]]))
    assert out.tolist() == [[False, False, True, True], [False, False, False, False]]
    only = operators.implausible(probabilities.log(), torch.tensor([[1.0], [1.0]]))
    assert only.tolist() == [[False, True, True, True], [False, True, True, True]]


@pytest.mark.parametrize("scale", [0.5, 1.5, 3.0])
def test_guidance_is_that_of_transformers(scale: float) -> None:
    base, negative = logits(1, seed=3), logits(1, seed=4)

    class Model:
        def __call__(self, *args: object, **kwargs: object) -> object:
            return type("Output", (), {"logits": negative[:, None], "get": lambda *_: None})()

    processor = UnbatchedClassifierFreeGuidanceLogitsProcessor(scale, Model(), unconditional_ids=torch.tensor([[1, 2]]))
    want = torch.log_softmax(processor(torch.tensor([[5]]), base), dim=-1)
    term = operators.guidance_term(base, torch.log_softmax(negative, -1), torch.tensor([[scale - 1.0]]))
    torch.testing.assert_close(torch.log_softmax(base + term, -1), want, atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_guidance_leaves_masked_tokens_masked(scale: float) -> None:
    base = logits(1)
    base[0, 10:] = -math.inf
    term = operators.guidance_term(base, torch.log_softmax(logits(1, seed=1), -1), torch.tensor([[scale - 1.0]]))
    assert torch.isneginf(base + term).tolist() == torch.isneginf(base).tolist()
    assert bool(torch.isfinite(term).all())


def test_a_schedule_gives_each_token_its_factor() -> None:
    schedule = AlphaSchedule(start=2, first=3, decay=0.5)
    assert [schedule.factor(n) for n in range(7)] == [0, 0, 1, 0.5, 0.25, 0, 0]
    assert AlphaSchedule(decay=0.9).factor(10) == pytest.approx(0.9**10)
    assert AlphaSchedule(first=1).factor(1) == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [("plausibility", 0.0), ("plausibility", 1.1), ("max_kl", 0.0), ("max_kl", math.nan), ("schedule", {"decay": 0.0})],
)
def test_operators_out_of_range_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        SteeringOperators.model_validate({field: value})
    assert caught.value.errors()[0]["loc"][0] == field


def test_explain_is_a_switch_or_a_number() -> None:
    assert SteeringRequest().num_alternatives is None
    assert SteeringRequest(explain=True).num_alternatives == 5
    assert SteeringRequest.model_validate({"explain": 0}, strict=True).num_alternatives == 0
    with pytest.raises(ValidationError):
        SteeringRequest.model_validate({"explain": 21}, strict=True)
