"""The policies that a task compares: a fine-tuned base as a tailored policy's special case, and a pair of experts."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tasks.policies import ExpertPair, FineTunedPolicy
from trimtab_adapters import mixing
from trimtab_training.policy import TailoredPolicy
from trimtab_training.sampler import sample_outputs

NUM_TOKENS = 32
PROMPTS = [(3, 4, 5), (7,)]
OUTPUTS = [(1, 2, 3), (9, 8)]


def tiny(seed: int, vocab_size: int = NUM_TOKENS) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def test_a_pair_of_experts_steers_as_two_terms_of_the_formula() -> None:
    base, expert, anti = tiny(1), tiny(2), tiny(3)
    policy = TailoredPolicy(base, ExpertPair(expert, anti), alpha=1.5, num_known=NUM_TOKENS)
    found = policy.forward(PROMPTS, OUTPUTS, [(), ()])
    with torch.no_grad():
        for row, (prompt, output) in enumerate(zip(PROMPTS, OUTPUTS, strict=True)):
            ids = torch.tensor([[*prompt, *output]])
            places = slice(len(prompt) - 1, len(prompt) + len(output) - 1)
            logits = [model(input_ids=ids).logits[0, places] for model in (base, expert, anti)]
            terms = [
                (weight, mixing.adapter_logprobs(part, vocab_size=NUM_TOKENS, num_known=NUM_TOKENS))
                for weight, part in zip((1.5, -1.5), logits[1:], strict=True)
            ]
            wanted = torch.log_softmax(mixing.steer(logits[0], terms), dim=-1)
            steered = torch.log_softmax(found.steered_logits[row, : len(output)], dim=-1)
            # float32, sums of three terms of size 10: a few units in the last place.
            assert torch.allclose(steered, wanted, atol=1e-5)


def test_a_pair_of_experts_samples_with_its_caches_as_it_reads_without() -> None:
    policy = TailoredPolicy(tiny(1), ExpertPair(tiny(2), tiny(3)), alpha=1.0, num_known=NUM_TOKENS)
    drawn = sample_outputs(
        policy,
        PROMPTS,
        (),
        max_tokens=6,
        temperature=1.0,
        top_p=1e-6,  # the most probable token alone
        end_token_ids=(),
        generator=torch.Generator().manual_seed(0),
    )
    tokens = [list(output.token_ids) for output in drawn]
    output = policy.forward(PROMPTS, tokens, [(), ()])
    assert output.steered_logits.argmax(dim=-1).tolist() == tokens


def test_a_fine_tuned_policy_draws_from_the_trained_model_and_measures_kl_to_the_base() -> None:
    base, tuned = tiny(1), tiny(2, vocab_size=NUM_TOKENS + 3)  # three control tokens
    policy = FineTunedPolicy(base, tuned, alpha=1.0, num_known=NUM_TOKENS)
    output = policy.forward([PROMPTS[0]], [OUTPUTS[0]], [()])
    with torch.no_grad():
        ids = torch.tensor([[*PROMPTS[0], *OUTPUTS[0]]])
        own = torch.log_softmax(tuned(input_ids=ids).logits[0, 2:5, :NUM_TOKENS], dim=-1)
        other = torch.log_softmax(base(input_ids=ids).logits[0, 2:5], dim=-1)
    assert torch.allclose(torch.log_softmax(output.steered_logits[0], dim=-1), own, atol=1e-5)
    wanted = (own.exp() * (own - other)).sum(dim=-1)
    assert output.kl()[0].tolist() == pytest.approx(wanted.tolist(), abs=1e-5)


def test_a_copy_of_the_base_begins_fine_tuning_at_the_base() -> None:
    policy = FineTunedPolicy(tiny(1), tiny(1), alpha=1.0, num_known=NUM_TOKENS)
    # Two forward passes of equal weights in float32.
    assert float(policy.forward(PROMPTS, OUTPUTS, [(), ()]).kl().detach().abs().max()) < 1e-6
