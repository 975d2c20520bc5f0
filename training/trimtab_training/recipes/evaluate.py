"""Base against steered on held-out prompts: reward, win rate, KL, perplexity and diversity."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimtab_adapters.contract.errors import EngineError
from trimtab_training.config import EvaluationConfig
from trimtab_training.policy import TailoredPolicy, evaluating
from trimtab_training.prompts import Prompt
from trimtab_training.rewards import Scorer
from trimtab_training.rollouts import RolloutSource, Sample

_ROWS_PER_FORWARD = 32

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TokenFigures:
    """Sums over the output tokens of some samples.

    Attributes:
        num_tokens: How many there are.
        base_logprob: Sum of the base's log-probabilities of them.
        kl: Sum of KL(steered || base) at their positions, in nats.
    """

    num_tokens: int
    base_logprob: float
    kl: float


def evaluate(
    source: RolloutSource,
    scorer: Scorer,
    policy: TailoredPolicy,
    prompts: Sequence[Prompt],
    *,
    adapter_prefix: Sequence[int],
    config: EvaluationConfig,
    seed: int,
    on_done: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Draw from base and steered policy for each prompt and compare.

    Sampling settings are the source's. KL and perplexity come from the two models in this process; where the base
    there is an approximate policy, they are relative to it.

    Returns:
        Figures for `manifest.evaluation`: for `base` and `steered` each `mean_reward`, `base_perplexity` (of the
        outputs under the base), `distinct_2` and `mean_tokens`; `reward_difference` with its 95 % bootstrap interval
        `reward_difference_interval` (prompts resampled); `win_rate` of a steered output over a base output for the same
        prompt, ties half; `kl_per_token`, KL(steered || base) at the tokens of steered outputs, in nats.
    """
    chosen = list(prompts)[: config.max_prompts]
    if not chosen:
        raise ValueError("an evaluation needs at least one prompt")
    figures: dict[str, Any] = {}
    rewards: dict[str, Floats] = {}
    for name, steered in (("base", False), ("steered", True)):
        drawn = source.draw(chosen, num_per_prompt=config.num_per_prompt, seed=seed, steered=steered, on_done=on_done)
        if any(len(samples) != config.num_per_prompt for samples in drawn):
            raise EngineError(f"an evaluation asked for {config.num_per_prompt} outputs per prompt and got others")
        samples = [sample for group in drawn for sample in group]
        scores = scorer.score([sample.reward_input for sample in samples]).rewards
        rewards[name] = np.array(scores, dtype=np.float64).reshape(len(chosen), config.num_per_prompt)
        tokens = token_figures(policy, samples, adapter_prefix)
        figures[name] = {
            "mean_reward": float(rewards[name].mean()),
            "base_perplexity": perplexity(tokens),
            "distinct_2": distinct_n([sample.output_token_ids for sample in samples], 2),
            "mean_tokens": float(np.mean([len(sample.output_token_ids) for sample in samples])),
        }
        if steered:
            figures["kl_per_token"] = tokens.kl / tokens.num_tokens if tokens.num_tokens else None
    difference, interval = difference_interval(
        rewards["base"].mean(axis=1), rewards["steered"].mean(axis=1), num_resamples=config.num_resamples, seed=seed
    )
    return {
        "num_prompts": len(chosen),
        "num_per_prompt": config.num_per_prompt,
        **figures,
        "reward_difference": difference,
        "reward_difference_interval": list(interval),
        "win_rate": win_rate(rewards["base"], rewards["steered"]),
    }


def token_figures(policy: TailoredPolicy, samples: Sequence[Sample], adapter_prefix: Sequence[int]) -> TokenFigures:
    """Run both models over samples, many rows at a time; what they cannot read, empty outputs first, adds nothing."""
    num_tokens, base_logprob, kl = 0, 0.0, 0.0
    readable = [s for s in samples if policy.can_read(s.prompt_token_ids, s.output_token_ids, adapter_prefix)]
    readable.sort(key=lambda sample: len(sample.output_token_ids))
    with evaluating(policy.adapter):
        for start in range(0, len(readable), _ROWS_PER_FORWARD):
            rows = readable[start : start + _ROWS_PER_FORWARD]
            output = policy.forward(
                [row.prompt_token_ids for row in rows],
                [row.output_token_ids for row in rows],
                [tuple(adapter_prefix)] * len(rows),
            )
            _, base_logprobs = output.token_logprobs()
            num_tokens += int(output.mask.sum())
            base_logprob += float(base_logprobs.double().sum())
            kl += float(output.kl().double().sum())
    return TokenFigures(num_tokens, base_logprob, kl)


def perplexity(figures: TokenFigures) -> float | None:
    """exp of the mean negative log-probability per token; None without tokens or beyond what a float holds."""
    if not figures.num_tokens:
        return None
    exponent = -figures.base_logprob / figures.num_tokens
    return math.exp(exponent) if exponent < 700.0 else None


def distinct_n(outputs: Sequence[Sequence[int]], n: int) -> float | None:
    """Different n-grams of tokens over all n-grams of all outputs together; None when no output is that long.

    It falls with the number of outputs, so only figures over equally many outputs can be compared.
    """
    ngrams = [tuple(output[i : i + n]) for output in outputs for i in range(len(output) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else None


def win_rate(base: Floats, steered: Floats) -> float:
    """Share of pairs (steered, base) of one prompt's outputs that the steered one wins, ties half.

    Args:
        base: Rewards `[prompts, outputs]`.
        steered: Rewards `[prompts, outputs]`.
    """
    differences = steered[:, :, None] - base[:, None, :]
    return float(((differences > 0) + 0.5 * (differences == 0)).mean())


def difference_interval(
    base: Floats, steered: Floats, *, num_resamples: int, seed: int
) -> tuple[float, tuple[float, float]]:
    """Mean difference of paired means with its 95 % percentile bootstrap interval over prompts.

    Args:
        base: Mean reward of each prompt, `[prompts]`.
        steered: Likewise.
        num_resamples: Bootstrap resamples.
        seed: Of the resampling.
    """
    differences = steered - base
    rng = np.random.default_rng([seed, 2])
    means = [
        float(differences[rng.integers(0, len(differences), len(differences))].mean()) for _ in range(num_resamples)
    ]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(differences.mean()), (float(low), float(high))
