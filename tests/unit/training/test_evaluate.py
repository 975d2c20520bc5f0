import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from trimtab_training.config import EvaluationConfig
from trimtab_training.policy import TailoredPolicy
from trimtab_training.prompts import Prompt
from trimtab_training.recipes.evaluate import (
    TokenFigures,
    difference_interval,
    distinct_n,
    evaluate,
    perplexity,
    token_figures,
    win_rate,
)
from trimtab_training.rewards import Scorer
from trimtab_training.rollouts import Sample


def test_win_rate_counts_all_pairs_of_a_prompt_and_ties_half() -> None:
    # prompt 0: (2 > 1) (2 > 0) (0 < 1) (0 = 0) = 1 + 1 + 0 + 1/2; prompt 1: all ties = 4/2. Together 4.5 of 8.
    base, steered = np.array([[1.0, 0.0], [3.0, 3.0]]), np.array([[2.0, 0.0], [3.0, 3.0]])
    assert win_rate(base, steered) == 4.5 / 8


def test_distinct_2_is_over_all_outputs_together() -> None:
    # bigrams: 12 23 | 12 24 | none -> 3 of 4 differ
    assert distinct_n([(1, 2, 3), (1, 2, 4), (1,)], 2) == 0.75
    assert distinct_n([(1,)], 2) is None


def test_perplexity_is_the_exponential_of_the_mean_nll() -> None:
    assert perplexity(TokenFigures(4, -4 * math.log(8.0), 0.0)) == pytest.approx(8.0)
    assert perplexity(TokenFigures(0, 0.0, 0.0)) is None
    assert perplexity(TokenFigures(1, -1e4, 0.0)) is None


def test_the_interval_has_the_width_of_the_normal_theory() -> None:
    """400 differences of deviation 1: standard error 0.05, so 95 % lie within 0.098; the bootstrap's own error on its
    ends (2,000 resamples) is about 0.003, so 0.015 is 5 of them."""
    differences = np.random.default_rng(0).normal(size=400)
    differences = (differences - differences.mean()) / differences.std() + 0.5
    mean, (low, high) = difference_interval(np.zeros(400), differences, num_resamples=2000, seed=0)
    assert mean == pytest.approx(0.5)
    assert low == pytest.approx(0.5 - 0.098, abs=0.015)
    assert high == pytest.approx(0.5 + 0.098, abs=0.015)


def test_token_figures_are_sums_over_single_rows(model_dirs: dict[str, Path]) -> None:
    base, adapter = (
        AutoModelForCausalLM.from_pretrained(model_dirs[name], dtype=torch.float32) for name in ("base", "adapter")
    )
    policy = TailoredPolicy(base, adapter, alpha=1.0, num_known=64)
    samples = [Sample("p", (1, 2), "o", tuple(range(3, 4 + n))) for n in range(40)] + [
        Sample("p", (1,), "", ()),
        Sample("p", (1,), "x", (64,)),
    ]
    whole = token_figures(policy, samples, (5,))
    single = [token_figures(policy, [sample], (5,)) for sample in samples]
    assert whole.num_tokens == sum(range(1, 41))
    assert whole.base_logprob == pytest.approx(sum(figures.base_logprob for figures in single), rel=1e-5)
    assert whole.kl == pytest.approx(sum(figures.kl for figures in single), rel=1e-5)
    assert whole.kl > 0.1


def test_base_and_steered_are_compared_on_the_same_prompts(model_dirs: dict[str, Path], lucky_scorer: Scorer) -> None:
    class Fixed:
        def draw(
            self,
            prompts: Sequence[Prompt],
            *,
            num_per_prompt: int,
            seed: int,
            steered: bool,
            on_done: Callable[[], None] | None = None,
        ) -> list[list[Sample]]:
            output = (7, 7) if steered else (7, 8)  # rewards 1 and 1/2
            text = " ".join(f"t{token}" for token in output)
            return [[Sample(p.text, (1,), text, output)] * num_per_prompt for p in prompts]

    base, adapter = (
        AutoModelForCausalLM.from_pretrained(model_dirs[name], dtype=torch.float32) for name in ("base", "adapter")
    )
    policy = TailoredPolicy(base, adapter, alpha=1.0, num_known=64)
    prompts = [Prompt(f"t{i}") for i in range(5)]
    config = EvaluationConfig(max_prompts=4, num_per_prompt=2, num_resamples=100)
    result = evaluate(Fixed(), lucky_scorer, policy, prompts, adapter_prefix=(5,), config=config, seed=0)
    assert (result["num_prompts"], result["num_per_prompt"]) == (4, 2)
    assert (result["base"]["mean_reward"], result["steered"]["mean_reward"]) == (0.5, 1.0)
    assert result["reward_difference"] == 0.5
    assert result["reward_difference_interval"] == [0.5, 0.5]
    assert result["win_rate"] == 1.0
    with torch.no_grad():
        output = policy.forward([(1,)], [(7, 7)], [(5,)])
    assert result["kl_per_token"] == pytest.approx(float(output.kl().mean()), rel=1e-5)
    assert result["steered"]["base_perplexity"] == pytest.approx(
        float((-output.token_logprobs()[1].mean()).exp()), rel=1e-5
    )
