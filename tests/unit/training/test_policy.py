import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from trimtab_training.policy import PolicyOutput, TailoredPolicy, evaluating

NUM_KNOWN = 64
PROMPTS = [(5, 6, 7), (9,), (10, 11, 12, 13, 14, 15)]
OUTPUTS = [(20, 21), (22, 23, 24, 25), (26,)]


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def by_hand(
    base: Any, adapter: Any, prompt: Sequence[int], output: Sequence[int], prefix: Sequence[int], alpha: float
) -> tuple[Tensor, Tensor]:
    """Steered and base log-probabilities token by token, no padding, no batch: softmax(z_b + alpha log q)."""
    steered, plain = [], []
    for position in range(len(output)):
        seen = [*prompt, *output[:position]]
        with torch.no_grad():
            z_base = base(input_ids=torch.tensor([seen])).logits[0, -1]
            z_adapter = adapter(input_ids=torch.tensor([[*prefix, *seen]])).logits[0, -1, :NUM_KNOWN]
        log_q = z_adapter - torch.logsumexp(z_adapter, dim=-1)
        steered.append(torch.log_softmax(z_base + alpha * log_q, dim=-1))
        plain.append(torch.log_softmax(z_base, dim=-1))
    return torch.stack(steered), torch.stack(plain)


@pytest.mark.parametrize("adapter_name", ["adapter", "untied", "gpt2"])
@pytest.mark.parametrize(("alpha", "prefixes"), [(1.0, [(64,)] * 3), (-0.7, [(), (65, 3), (66,)]), (0.0, [()] * 3)])
def test_a_padded_batch_gives_what_a_loop_by_hand_gives(
    model_dirs: dict[str, Path], adapter_name: str, alpha: float, prefixes: list[tuple[int, ...]]
) -> None:
    base, adapter = load(model_dirs["base"]), load(model_dirs[adapter_name])
    adapter.resize_token_embeddings(NUM_KNOWN + 3, mean_resizing=False)
    policy = TailoredPolicy(base, adapter, alpha=alpha, num_known=NUM_KNOWN)
    output = policy.forward(PROMPTS, OUTPUTS, prefixes)
    assert output.mask.sum(dim=-1).tolist() == [2, 4, 1]
    steered_tokens, base_tokens = output.token_logprobs()
    kl, entropy = output.kl(), output.entropy()
    for row, (prompt, tokens, prefix) in enumerate(zip(PROMPTS, OUTPUTS, prefixes, strict=True)):
        steered, plain = by_hand(base, adapter, prompt, tokens, prefix, alpha)
        num = len(tokens)
        assert torch.allclose(torch.log_softmax(output.steered_logits[row, :num], dim=-1), steered, atol=1e-5)
        assert torch.allclose(torch.log_softmax(output.base_logits[row, :num], dim=-1), plain, atol=1e-5)
        chosen = torch.tensor(tokens)[:, None]
        assert torch.allclose(steered_tokens[row, :num], steered.gather(-1, chosen)[:, 0], atol=1e-5)
        assert torch.allclose(base_tokens[row, :num], plain.gather(-1, chosen)[:, 0], atol=1e-5)
        assert torch.allclose(kl[row, :num], (steered.exp() * (steered - plain)).sum(dim=-1), atol=1e-5)
        assert torch.allclose(entropy[row, :num], -(steered.exp() * steered).sum(dim=-1), atol=1e-5)
        assert not steered_tokens[row, num:].any()
        assert not kl[row, num:].any()
        assert not entropy[row, num:].any()


def test_the_order_of_rows_does_not_matter(model_dirs: dict[str, Path]) -> None:
    policy = TailoredPolicy(load(model_dirs["base"]), load(model_dirs["gpt2"]), alpha=1.0, num_known=NUM_KNOWN)
    prefixes = [(1,), (), (2, 3)]
    forward = policy.forward(PROMPTS, OUTPUTS, prefixes).steered_logits
    backward = policy.forward(PROMPTS[::-1], OUTPUTS[::-1], prefixes[::-1]).steered_logits
    assert torch.allclose(forward[0, :2], backward[2, :2], atol=1e-5)


def test_only_the_adapter_gets_gradients_and_they_are_finite(model_dirs: dict[str, Path]) -> None:
    base, adapter = load(model_dirs["base"]), load(model_dirs["adapter"])
    output = TailoredPolicy(base, adapter, alpha=1.0, num_known=NUM_KNOWN).forward(PROMPTS, OUTPUTS, [(1,)] * 3)
    output.token_logprobs()[0].sum().backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for parameter in base.parameters())
    gradients = [parameter.grad for parameter in adapter.parameters()]
    assert all(gradient is not None and bool(torch.isfinite(gradient).all()) for gradient in gradients)
    assert any(bool(gradient.any()) for gradient in gradients if gradient is not None)


def test_columns_behind_the_vocabulary_change_nothing(model_dirs: dict[str, Path]) -> None:
    base, adapter = load(model_dirs["base"]), load(model_dirs["untied"])
    before = TailoredPolicy(base, adapter, alpha=1.0, num_known=NUM_KNOWN).forward(PROMPTS, OUTPUTS, [()] * 3)
    adapter.resize_token_embeddings(NUM_KNOWN + 5, mean_resizing=False)
    with torch.no_grad():
        adapter.get_output_embeddings().weight[NUM_KNOWN:] = 100.0
    after = TailoredPolicy(base, adapter, alpha=1.0, num_known=NUM_KNOWN).forward(PROMPTS, OUTPUTS, [()] * 3)
    assert torch.equal(before.steered_logits, after.steered_logits)


@pytest.mark.parametrize(("prompt", "output"), [((), (1,)), ((1,), ())])
def test_an_empty_prompt_or_output_is_refused(
    model_dirs: dict[str, Path], prompt: tuple[int, ...], output: tuple[int, ...]
) -> None:
    policy = TailoredPolicy(load(model_dirs["base"]), load(model_dirs["adapter"]), alpha=1.0, num_known=NUM_KNOWN)
    with pytest.raises(ValueError, match="at least one"):
        policy.forward([prompt], [output], [()])


def test_evaluating_puts_the_mode_back_after_an_error(model_dirs: dict[str, Path]) -> None:
    model = load(model_dirs["adapter"]).train()

    def fail_inside() -> None:
        with evaluating(model):
            assert not model.training
            assert not torch.is_grad_enabled()
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert model.training
    assert torch.is_grad_enabled()


def test_a_token_that_the_base_forbids_adds_nothing_to_the_entropy() -> None:
    """Probabilities 1/4, 3/4 and 0. The gradient of the entropy H for a logit is -p (log p + H)."""
    logits = torch.tensor([[[0.0, math.log(3.0), -torch.inf]]], requires_grad=True)
    a_token = torch.zeros(1, 1, dtype=torch.long)
    entropy = PolicyOutput(logits, logits.detach(), a_token, mask=a_token == 0).entropy().sum()
    entropy.backward()  # type: ignore[no-untyped-call]
    expected = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    slope = 0.25 * (math.log(0.25) + expected)
    assert float(entropy.detach()) == pytest.approx(expected)
    assert logits.grad is not None
    assert logits.grad[0, 0].tolist() == pytest.approx([-slope, slope, 0.0], abs=1e-6)
