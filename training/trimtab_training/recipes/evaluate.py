"""Base against steered on held-out prompts: drawn, scored, read by both models, and compared."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trimtab_adapters.contract.errors import EngineError
from trimtab_training.config import SamplingConfig
from trimtab_training.evaluation.held_out import Comparer, Drawn, HeldOutFigures
from trimtab_training.evaluation.intervals import Intervals
from trimtab_training.evaluation.procedures import Chosen
from trimtab_training.evaluation.report import Report
from trimtab_training.evaluation.token_sums import sum_tokens
from trimtab_training.evaluation_config import EvaluationConfig
from trimtab_training.policy import TailoredPolicy
from trimtab_training.prompts import Prompt
from trimtab_training.rewards import Scorer
from trimtab_training.rollouts import RolloutSource, Sample
from trimtab_training.sample_pools import draw_in_parts


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an evaluation found, and what it found it in.

    Attributes:
        figures: All of them.
        comparison: Those of them that `trimtab evaluate` gives as well, in the form that its plot reads.
        base: Drawn from the base.
        steered: Drawn from the tailored policy.
    """

    figures: HeldOutFigures
    comparison: Report
    base: Drawn
    steered: Drawn


def evaluate(
    source: RolloutSource,
    scorers: Sequence[Scorer],
    policy: TailoredPolicy,
    prompts: Sequence[Prompt],
    *,
    adapter_prefix: Sequence[int],
    procedure: Chosen,
    sampling: SamplingConfig,
    config: EvaluationConfig,
    seed: int,
    on_done: Callable[[], None] | None = None,
) -> Evaluation:
    """Draw from base and steered policy for each prompt and compare.

    KL, entropy and perplexity come from the two models in this process; where the base there is an approximate policy,
    they are relative to it.

    Args:
        source: Draws, as `sampling` says.
        scorers: The reward, and a second one where there is one.
        policy: Both models.
        prompts: Held out; the first `config.max_prompts` of them are used.
        adapter_prefix: What the adapter sees before each prompt.
        procedure: The served one.
        sampling: The source's settings.
        config: How much is drawn, and what is counted.
        seed: Of the draws and of the bootstrap. Base and steered outputs are drawn independently of each other.
        on_done: Called after each prompt of each draw.

    Raises:
        TrimtabError: Drawing or scoring failed; no output is left out.
    """
    chosen = list(prompts)[: config.max_prompts]
    if not chosen:
        raise ValueError("an evaluation needs at least one prompt")
    num = max(config.num_per_prompt, procedure.n + 1)
    seeds = np.random.SeedSequence(seed).spawn(2)
    versions: dict[str, str] = {}

    def drawn(draw_seed: np.random.SeedSequence, *, steered: bool) -> Drawn:
        pools: list[list[Sample]] = [[] for _ in chosen]
        for part in draw_in_parts(source, chosen, size=num, seed=draw_seed, steered=steered, on_done=on_done):
            for pool, samples in zip(pools, part, strict=True):
                pool.extend(samples)
        if any(len(pool) != num for pool in pools):
            raise EngineError(f"an evaluation asked for {num} outputs per prompt and got others")
        samples = [sample for pool in pools for sample in pool]
        rewards = {}
        for scorer in scorers:
            reply = scorer.score([sample.reward_input for sample in samples])
            rewards[scorer.name] = np.array(reply.rewards, dtype=np.float64).reshape(len(chosen), num)
            versions[scorer.name] = reply.version
        return Drawn(pools, rewards, sum_tokens(policy, samples, adapter_prefix))

    base, steered = drawn(seeds[0], steered=False), drawn(seeds[1], steered=True)
    comparer = Comparer(
        Intervals("percentile", num_resamples=config.num_resamples, seed=seed),
        procedure,
        is_plain=sampling.temperature == 1.0 and sampling.top_p == 1.0,
        max_tokens=sampling.max_tokens,
        refusal_phrases=config.refusal_phrases,
    )
    report = comparer.report(base, steered, versions=versions)
    return Evaluation(comparer.figures(base, steered, report), report, base, steered)
