import math

import pytest
import torch

from trimtab_adapters.mixing import adapter_logprobs, argmax, kl_to_base, steer, steering_term

P = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
Q = torch.tensor([0.1, 0.6, 0.3], dtype=torch.float64)


@pytest.mark.parametrize(
    ("alpha", "temperature", "expected"),
    [
        (0.0, 1.0, (0.7, 0.2, 0.1)),
        (0.5, 1.0, (0.513534, 0.359399, 0.127067)),
        (1.0, 1.0, (0.318182, 0.545455, 0.136364)),  # 0.07, 0.12, 0.03 over 0.22
        (2.0, 1.0, (0.079545, 0.818182, 0.102273)),
        (1.0, 0.5, (0.242574, 0.712871, 0.044554)),
    ],
)
def test_the_tailored_policy_is_the_product_of_experts(
    alpha: float, temperature: float, expected: tuple[float, ...]
) -> None:
    steered = steer(P.log() + 3.0, [(alpha, Q.log())])  # a constant in the base changes nothing
    got = torch.softmax(steered / temperature, dim=-1)
    assert got.tolist() == pytest.approx(expected, abs=6e-7)


def test_expert_and_anti_expert_cancel_where_they_agree() -> None:
    steered = steer(P.log(), [(1.5, Q.log()), (-1.5, Q.log())])
    assert torch.softmax(steered, -1).tolist() == pytest.approx(P.tolist(), abs=1e-12)


def test_alpha_zero_returns_the_base_itself_bit_for_bit() -> None:
    base = torch.tensor([-0.0, float("-inf"), 1e-40])
    assert steer(base, [(0.0, torch.zeros(3))]) is base
    assert steer(base, []) is base


@pytest.mark.parametrize("alpha", [2.0, -2.0])
def test_minus_infinity_in_the_base_stays(alpha: float) -> None:
    base = torch.tensor([0.0, float("-inf"), 1.0])
    steered = steer(base, [(alpha, torch.tensor([-1.0, -50.0, -2.0]))])
    assert steered[1] == float("-inf")
    assert torch.isfinite(steered[[0, 2]]).all()


def test_control_tokens_and_padding_of_the_adapter_take_no_probability() -> None:
    logits = torch.tensor([[0.0, math.log(3.0), 100.0, 100.0]])  # two real tokens, two control tokens
    logprobs = adapter_logprobs(logits, vocab_size=2, num_known=2)
    assert logprobs.exp().tolist() == [pytest.approx([0.25, 0.75])]


def test_tokens_that_the_adapter_does_not_know_get_its_floor_not_zero() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [math.log(4.0), 0.0]])
    logprobs = adapter_logprobs(logits, vocab_size=4, num_known=2)
    assert logprobs.exp()[0].tolist() == pytest.approx([0.25, 0.75, 0.25, 0.25])
    assert logprobs.exp()[1].tolist() == pytest.approx([0.8, 0.2, 0.2, 0.2])


@pytest.mark.parametrize("num_known", [0, 3, 5])
def test_a_known_part_that_cannot_be_is_refused(num_known: int) -> None:
    with pytest.raises(ValueError, match="num_known"):
        adapter_logprobs(torch.zeros(1, 2), vocab_size=4, num_known=num_known)


def test_half_precision_logits_are_normalised_in_float32() -> None:
    logits = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    logprobs = adapter_logprobs(logits, vocab_size=1000, num_known=1000)
    assert logprobs.dtype == torch.float32
    assert logprobs.exp().sum(-1).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)


def test_kl_is_the_sum_over_the_steered_distribution_and_ignores_masked_tokens() -> None:
    base = torch.cat((P, torch.zeros(1, dtype=torch.float64))).log()
    steered = steer(base, [(1.0, torch.cat((Q.log(), torch.tensor([-3.0], dtype=torch.float64))))])
    tailored = (P * Q) / (P * Q).sum()
    expected = float((tailored * (tailored / P).log()).sum())
    assert float(kl_to_base(steered, base)) == pytest.approx(expected, abs=1e-12)
    assert float(kl_to_base(base, base)) == 0.0


def test_terms_without_an_adapter_are_refused() -> None:
    with pytest.raises(ValueError, match="without terms"):
        steering_term([])


def test_gradients_flow_through_the_combined_softmax() -> None:
    """d NLL / d z_k = alpha (pi_k - [k = y]): normalising z first only shifts the row, which changes nothing in pi."""
    z = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    alpha, y = 0.7, 2
    steered = steer(P.log(), [(alpha, torch.log_softmax(z, -1))])
    (gradient,) = torch.autograd.grad(-torch.log_softmax(steered, -1)[y], z)
    pi = torch.softmax(P.log() + alpha * z.detach(), -1)
    expected = alpha * (pi - torch.eye(3, dtype=torch.float64)[y])
    assert gradient.tolist() == pytest.approx(expected.tolist(), abs=1e-12)


@pytest.mark.parametrize("width", [1, 100, 256, 512, 1024, 32_768])
def test_argmax_finds_the_first_largest_value_also_among_ties_and_minus_infinity(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    values = torch.randint(0, 5, (64, width), generator=generator).float()
    values[::3] = -torch.inf
    values[::3, width // 2] = 1.0
    assert torch.equal(argmax(values), values.argmax(dim=-1))
