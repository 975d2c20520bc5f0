import math

import pytest
import torch
from torch import Tensor

from trimtab_adapters import mixing
from trimtab_training.objectives.quark import QuarkInputs, quark_loss

# From the definition pi(v) ~ p(v) * q(v): p = (.7, .2, .1), q = (.1, .6, .3) give .07, .12, .03 over their sum .22.
P = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
Q = torch.tensor([0.1, 0.6, 0.3], dtype=torch.float64)
PI = torch.tensor([7, 12, 3], dtype=torch.float64) / 22


def inputs(steered: Tensor, base: Tensor, tokens: list[int]) -> QuarkInputs:
    """One row of as many positions as tokens, all of them real."""
    return QuarkInputs(steered[None], base[None], torch.tensor([tokens]), torch.ones(1, len(tokens), dtype=torch.bool))


def test_the_loss_is_nll_plus_kl_minus_entropy_by_hand() -> None:
    # pi = (1/2, 1/2), p = (3/4, 1/4), token 0: NLL = ln 2, H = ln 2, KL = 1/2 ln(2/3) + 1/2 ln 2 = 1/2 ln(4/3)
    steered, base = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
    result = quark_loss(inputs(steered, base, [0]), kl_coef=0.05, entropy_coef=0.06)
    assert float(result.nll) == pytest.approx(math.log(2), abs=1e-6)
    assert float(result.entropy) == pytest.approx(math.log(2), abs=1e-6)
    assert float(result.kl) == pytest.approx(0.5 * math.log(4 / 3), abs=1e-6)
    assert float(result.loss) == pytest.approx(0.94 * math.log(2) + 0.025 * math.log(4 / 3), abs=1e-6)


def test_the_mean_is_over_all_real_tokens_of_the_batch_alike() -> None:
    # Row 0 has one token of NLL ln 2, row 1 two of NLL ln 4; padding holds nonsense. Mean: (ln 2 + 2 ln 4) / 3.
    steered = torch.tensor([[[0.0, 0.0, -99.0, -99.0], [9.0, 9, 9, 9]], [[0.0, 0, 0, 0], [0.0, 0, 0, 0]]])
    mask = torch.tensor([[True, False], [True, True]])
    result = quark_loss(
        QuarkInputs(steered, steered, torch.zeros(2, 2, dtype=torch.long), mask), kl_coef=0, entropy_coef=0
    )
    assert float(result.loss) == pytest.approx((math.log(2) + 2 * math.log(4)) / 3, abs=1e-6)
    assert float(result.kl) == pytest.approx(0.0, abs=1e-6)


def test_a_token_that_the_base_forbids_counts_as_zero_in_value_and_gradient() -> None:
    # pi = p = (1/2, 1/2, 0)
    adapter = torch.zeros(1, 3, requires_grad=True)
    base = torch.tensor([[0.0, 0.0, -math.inf]])
    result = quark_loss(inputs(base + adapter, base, [1]), kl_coef=1.0, entropy_coef=1.0)
    result.loss.backward()  # type: ignore[no-untyped-call]
    assert float(result.entropy) == pytest.approx(math.log(2), abs=1e-6)
    assert float(result.kl) == pytest.approx(0.0, abs=1e-6)
    assert adapter.grad is not None
    assert torch.isfinite(adapter.grad).all()
    assert float(adapter.grad[0, 2]) == 0.0


def test_without_a_real_token_there_is_no_loss() -> None:
    mask = torch.zeros(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="no loss"):
        quark_loss(
            QuarkInputs(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.long), mask),
            kl_coef=0,
            entropy_coef=0,
        )


def nll(adapter_logits: Tensor, base_logits: Tensor, token: int, alpha: float, num_known: int) -> Tensor:
    logprobs = mixing.adapter_logprobs(adapter_logits, vocab_size=base_logits.shape[-1], num_known=num_known)
    steered = mixing.steer(base_logits.float(), [(alpha, logprobs)])
    return quark_loss(inputs(steered[None], base_logits[None], [token]), kl_coef=0, entropy_coef=0).loss


def test_the_gradient_is_alpha_times_policy_minus_one_hot_by_hand() -> None:
    """Steered_j = b_j + alpha (z_j - L), L = logsumexp(z). d NLL/d steered_j = pi_j - 1[j = y] sums to 0 over j, so the
    part through L vanishes and alpha (pi_k - 1[k = y]) is left: at alpha 1 and y = 0, (7/22 - 1, 12/22, 3/22)."""
    adapter = (Q.log() + 5.0).float().requires_grad_(True)  # + 5: not normalised
    nll(adapter, P.log(), 0, alpha=1.0, num_known=3).backward()  # type: ignore[no-untyped-call]
    assert adapter.grad is not None
    assert torch.allclose(adapter.grad.double(), torch.tensor([-15.0, 12.0, 3.0]).double() / 22, atol=1e-6)


@pytest.mark.parametrize("alpha", [1.0, 0.5, -0.7])
@pytest.mark.parametrize(("token", "num_known"), [(0, 5), (4, 5), (1, 3), (4, 3)])
def test_the_gradient_agrees_with_its_formula_and_with_finite_differences(
    alpha: float, token: int, num_known: int
) -> None:
    """With unknown ids U at the row's floor, steered_u = b_u + alpha (min z - L): the smallest known logit also gets
    the part of all of U, alpha (pi_k - 1[k = y] + 1[k = argmin] (pi_U - 1[y in U])); control columns get nothing."""
    torch.manual_seed(0)
    base, start = torch.randn(5), torch.randn(num_known + 2)  # two control tokens behind the known ids
    adapter = start.clone().requires_grad_(True)
    nll(adapter, base, token, alpha, num_known).backward()  # type: ignore[no-untyped-call]

    logprobs = mixing.adapter_logprobs(start, vocab_size=5, num_known=num_known)
    error = torch.softmax(base + alpha * logprobs, dim=-1) - torch.eye(5)[token]
    expected = torch.zeros(num_known + 2)
    expected[:num_known] = error[:num_known]
    expected[int(start[:num_known].argmin())] += error[num_known:].sum()
    assert adapter.grad is not None
    assert torch.allclose(adapter.grad, alpha * expected, atol=1e-6)

    step = 1e-2  # float32: rounding 1e-7 / step and curvature step^2 are both below the tolerance
    for k in range(num_known + 2):
        shift = torch.zeros(num_known + 2)
        shift[k] = step
        up, down = (nll(start + sign * shift, base, token, alpha, num_known) for sign in (1, -1))
        assert float(up - down) / (2 * step) == pytest.approx(float(adapter.grad[k]), abs=2e-4)


def test_the_gradient_of_kl_and_entropy_agrees_with_finite_differences() -> None:
    torch.manual_seed(1)
    base, start = torch.randn(2, 4), torch.randn(2, 4)

    def loss(logits: Tensor) -> Tensor:
        return quark_loss(inputs(logits, base, [1, 3]), kl_coef=0.3, entropy_coef=0.2).loss

    logits = start.clone().requires_grad_(True)
    loss(logits).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    for place in [(0, 0), (0, 1), (1, 2), (1, 3)]:
        shift = torch.zeros(2, 4)
        shift[place] = 1e-2
        difference = float(loss(start + shift) - loss(start - shift)) / 2e-2
        assert difference == pytest.approx(float(logits.grad[place]), abs=2e-4)
