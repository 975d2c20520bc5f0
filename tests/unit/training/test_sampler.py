from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM

from trimtab_training.interruption import Interruption, TrainingInterrupted
from trimtab_training.policy import TailoredPolicy
from trimtab_training.sampler import AllowedTokens, sample_outputs, smallest_set

PROMPTS = [(5, 6, 7), (9,), (10, 11, 12, 13, 14, 15)]
PREFIX = (64,)


@pytest.fixture(params=["adapter", "gpt2"])
def policy(request: pytest.FixtureRequest, model_dirs: dict[str, Path]) -> TailoredPolicy:
    base, adapter = (
        AutoModelForCausalLM.from_pretrained(model_dirs[name], dtype=torch.float32) for name in ("base", request.param)
    )
    adapter.resize_token_embeddings(66, mean_resizing=False)
    return TailoredPolicy(base, adapter, alpha=1.0, num_known=64)


def draw(
    policy: TailoredPolicy,
    prompts: list[tuple[int, ...]],
    *,
    prefix: tuple[int, ...] | None = PREFIX,
    max_tokens: int = 6,
    temperature: float = 1.0,
    top_p: float = 1.0,
    ends: frozenset[int] = frozenset(),
    seed: int = 0,
    interruption: Interruption | None = None,
) -> list[list[int]]:
    outputs = sample_outputs(
        policy,
        prompts,
        prefix,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        end_token_ids=ends,
        generator=torch.Generator().manual_seed(seed),
        interruption=interruption,
    )
    return [list(output.token_ids) for output in outputs]


@pytest.mark.parametrize("prefix", [PREFIX, None])
def test_each_token_comes_with_its_logprobs_under_the_policy_and_the_base(
    policy: TailoredPolicy, prefix: tuple[int, ...] | None
) -> None:
    outputs = sample_outputs(
        policy,
        PROMPTS,
        prefix,
        max_tokens=6,
        temperature=0.7,
        top_p=0.9,
        end_token_ids=range(0, 64, 4),  # some outputs end early
        generator=torch.Generator().manual_seed(3),
    )
    lengths = [len(output.token_ids) for output in outputs]
    assert min(lengths) < 6
    with torch.no_grad():
        read = policy.forward(PROMPTS, [output.token_ids for output in outputs], [prefix or ()] * len(PROMPTS))
    steered, base = read.token_logprobs()
    for row, output in enumerate(outputs):
        assert output.base_logprobs == pytest.approx(base[row, : lengths[row]].tolist(), abs=1e-4)
        expected = steered if prefix is not None else base
        assert output.steered_logprobs == pytest.approx(expected[row, : lengths[row]].tolist(), abs=1e-4)


@pytest.mark.parametrize("prefix", [PREFIX, None])
def test_the_most_probable_tokens_are_those_of_the_training_forward_pass(
    policy: TailoredPolicy, prefix: tuple[int, ...] | None
) -> None:
    """A tiny nucleus is greedy; each token must be the argmax of the distribution that training sees there."""
    outputs = draw(policy, PROMPTS, prefix=prefix, top_p=1e-6)
    with torch.no_grad():
        result = policy.forward(PROMPTS, outputs, [prefix or ()] * 3)
    logits = result.base_logits if prefix is None else result.steered_logits
    assert logits.argmax(dim=-1).tolist() == outputs


def test_frequencies_are_the_tailored_policys(policy: TailoredPolicy) -> None:
    """20,000 draws after one context against the exact probabilities; odds of a false alarm 1e-4 if unseeded."""
    context = PROMPTS[0]
    outputs = draw(policy, [context] * 20_000, max_tokens=1)
    with torch.no_grad():
        logits = policy.forward([context], [(1,)], [PREFIX]).steered_logits[0, 0]
    expected = torch.softmax(logits.double(), dim=-1) * len(outputs)
    counts = Counter(output[0] for output in outputs)
    observed = torch.tensor([float(counts[token]) for token in range(64)])
    rare = expected < 5
    pooled_observed = [*observed[~rare].tolist(), float(observed[rare].sum())]
    pooled_expected = [*expected[~rare].tolist(), float(expected[rare].sum())]
    scale = sum(pooled_observed) / sum(pooled_expected)
    assert chisquare(pooled_observed, [value * scale for value in pooled_expected]).pvalue > 1e-4


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p_after_temperature(policy: TailoredPolicy) -> None:
    with torch.no_grad():
        logits = policy.forward([PROMPTS[0]], [(1,)], [PREFIX]).steered_logits[0, 0]

    def nucleus(temperature: float) -> set[int]:
        probabilities, order = torch.softmax(logits / temperature, dim=-1).sort(descending=True)
        size = int((probabilities.cumsum(dim=-1) < 0.5).sum()) + 1
        return set(order[:size].tolist())

    drawn = {output[0] for output in draw(policy, [PROMPTS[0]] * 3000, max_tokens=1, temperature=2.0, top_p=0.5)}
    assert drawn <= nucleus(2.0)
    assert not drawn <= nucleus(1.0)


def test_an_output_ends_with_its_end_token_or_at_the_limit(policy: TailoredPolicy) -> None:
    ends = frozenset(range(0, 64, 4))
    outputs = draw(policy, PROMPTS * 20, max_tokens=5, ends=ends)
    for output in outputs:
        assert 1 <= len(output) <= 5
        assert not ends & set(output[:-1])
        assert len(output) == 5 or output[-1] in ends
    assert any(len(output) < 5 for output in outputs)


def test_the_seed_decides_the_outputs(policy: TailoredPolicy) -> None:
    assert draw(policy, PROMPTS, seed=1) == draw(policy, PROMPTS, seed=1)
    assert draw(policy, PROMPTS, seed=1) != draw(policy, PROMPTS, seed=2)


def test_padding_rows_of_the_base_are_never_drawn(policy: TailoredPolicy) -> None:
    policy.base.resize_token_embeddings(80, mean_resizing=False)
    with torch.no_grad():
        policy.base.get_output_embeddings().weight[64:] *= 0.0
    assert all(token < 64 for output in draw(policy, PROMPTS * 30) for token in output)


def test_sampling_stops_when_asked_and_leaves_the_mode(policy: TailoredPolicy) -> None:
    policy.adapter.train()
    interruption = Interruption()
    interruption.request("cancelled")
    with pytest.raises(TrainingInterrupted):
        draw(policy, PROMPTS, interruption=interruption)
    assert policy.adapter.training


def test_the_smallest_set_reaches_its_share_and_has_its_fewest_tokens() -> None:
    probabilities = torch.tensor([[0.15, 0.5, 0.05, 0.3], [0.1, 0.2, 0.3, 0.4]])

    def kept(share: float, min_tokens: int = 1) -> list[list[int]]:
        rows = smallest_set(probabilities, share=share, min_tokens=min_tokens)
        return [row.nonzero().flatten().tolist() for row in rows]

    assert kept(0.45) == [[1], [2, 3]]
    assert kept(0.75) == [[1, 3], [1, 2, 3]]
    assert kept(0.45, min_tokens=2) == [[1, 3], [2, 3]]
    assert kept(0.45, min_tokens=9) == kept(1.0) == [[0, 1, 2, 3]] * 2
    halves = torch.tensor([0.5, 0.25, 0.25])
    assert smallest_set(halves, share=0.5).tolist() == [True, False, False]  # exactly enough is enough


def test_a_mask_is_begun_for_each_batch_and_asked_before_each_token(policy: TailoredPolicy) -> None:
    """The first token must be even, every later one the one before plus 1, whatever the policy thinks of it."""

    class Counting:
        def __init__(self) -> None:
            self.begun: list[list[tuple[int, ...]]] = []

        def begin(self, policy: TailoredPolicy, prompt_token_ids: Sequence[Sequence[int]]) -> AllowedTokens:
            self.begun.append([tuple(prompt) for prompt in prompt_token_ids])

            def allowed(base_logits: torch.Tensor, newest: torch.Tensor | None) -> torch.Tensor:
                tokens = torch.arange(64)[None]
                return (tokens % 2 == 0).expand(3, -1) if newest is None else tokens == (newest[:, None] + 1) % 64

            return allowed

    mask = Counting()
    for _ in range(2):
        outputs = sample_outputs(
            policy,
            PROMPTS,
            PREFIX,
            max_tokens=5,
            temperature=1.0,
            top_p=1.0,
            end_token_ids=(),
            generator=torch.Generator().manual_seed(0),
            mask=mask,
        )
        rows = [list(output.token_ids) for output in outputs]
        assert all(row[0] % 2 == 0 for row in rows)
        assert all(row == [(row[0] + i) % 64 for i in range(5)] for row in rows)
        assert all(output.steered_logprobs is None for output in outputs), "not of the policy without the mask"
    assert mask.begun == [PROMPTS, PROMPTS]
