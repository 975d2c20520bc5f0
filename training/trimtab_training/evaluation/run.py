"""An evaluation from its configuration to its report, against a running gateway."""

import time
from collections.abc import Sequence
from typing import NoReturn

import numpy as np
from tqdm import tqdm

from trimtab_adapters.contract.errors import EngineError
from trimtab_adapters.contract.rewards import RewardInput
from trimtab_training.evaluation.comparison import Comparison
from trimtab_training.evaluation.draws import Drawer, Draws
from trimtab_training.evaluation.policies import resolve_policies
from trimtab_training.evaluation.procedures import Served
from trimtab_training.evaluation.prompt_file import Prompt, fingerprint, read_prompts
from trimtab_training.evaluation.report import Report
from trimtab_training.evaluation.sample_cache import SampleCache
from trimtab_training.evaluation.scored import Scored
from trimtab_training.evaluation.settings import EvaluateConfig
from trimtab_training.gateway import GatewayClient
from trimtab_training.interruption import Interruption
from trimtab_training.rewards import GatewayScorer, SingleVersionScorer


def evaluate(
    config: EvaluateConfig,
    gateway: GatewayClient,
    cache: SampleCache,
    *,
    interruption: Interruption,
    show_progress: bool | None = None,
) -> Report:
    """Draw, score and compare.

    Args:
        config: What to evaluate.
        gateway: Where.
        cache: Samples that are there already, and where new ones go.
        interruption: Ends the run early; what was drawn stays in the cache.
        show_progress: Whether a bar is drawn on standard error; None draws it on a terminal only.

    Raises:
        TrimtabError: Anything failed: nothing is left out of a report.
        TrainingInterrupted: A stop was asked for.
    """
    started_at, start = time.time(), time.monotonic()
    prompts = read_prompts(config.prompts, lambda ids: _detokenize(gateway, ids), limit=config.max_prompts)
    policies = {policy.name: policy for policy in resolve_policies(gateway, config.policies, prompts[0])}
    names = [config.reward, *([] if config.judge is None else [config.judge])]
    scorers = [SingleVersionScorer(GatewayScorer(gateway, n, batch_size=config.reward_batch_size)) for n in names]
    probe = [RewardInput(prompt=prompts[0].text, output=prompts[0].text)]
    versions = {scorer.name: scorer.score(probe).version for scorer in scorers}  # fails before anything is drawn

    drawer = Drawer(
        gateway,
        prompts,
        num_samples=config.samples,
        sampling=config.sampling,
        seed=config.seed,
        common_seeds=config.common_seeds,
        cache=cache,
        interruption=interruption,
    )
    needed = _needed_draws(config)
    scored: dict[tuple[str, Served | None], Scored] = {}
    total = len(needed) * len(prompts) * config.samples
    with tqdm(
        total=total, unit="sample", disable=None if show_progress is None else not show_progress, dynamic_ncols=True
    ) as bar:
        for name, served in needed:
            draws = drawer.draw(
                policies[name],
                served,
                reward=config.reward,
                reward_version=versions[config.reward],
                on_done=lambda: _advance(bar),
            )
            scored[name, served] = _score(draws, prompts, scorers)
    return Comparison(config, policies, scored).report(
        prompts={"num": len(prompts), "sha256": fingerprint(prompts)},
        rewards=versions,
        times={"started_at": started_at, "duration_s": time.monotonic() - start},
    )


def _needed_draws(config: EvaluateConfig) -> list[tuple[str, Served | None]]:
    names = [policy.name for policy in config.policies]
    plain: list[tuple[str, Served | None]] = [(name, None) for name in names]
    served = [(name, p) for p in config.parsed_procedures if isinstance(p, Served) for name in names]
    sides = [side.draws for pair in config.pairs for side in pair]
    return list(dict.fromkeys([*plain, *served, *sides]))


def _score(draws: Draws, prompts: Sequence[Prompt], scorers: Sequence[SingleVersionScorer]) -> Scored:
    """The rewards of all samples. The same answer to the same prompt is scored once, so that it ties with itself."""
    inputs = [
        [RewardInput(prompt=prompt.text, output=sample.output) for sample in row]
        for prompt, row in zip(prompts, draws.samples, strict=True)
    ]
    different = list(dict.fromkeys(item for row in inputs for item in row))
    rewards = {}
    for scorer in scorers:
        reward_of = dict(zip(different, scorer.score(different).rewards, strict=True))
        rewards[scorer.name] = np.array([[reward_of[item] for item in row] for row in inputs], dtype=np.float64)
    return Scored(draws, rewards)


def _advance(bar: "tqdm[NoReturn]") -> None:
    bar.update()


def _detokenize(gateway: GatewayClient, token_ids: Sequence[int]) -> str:
    text = gateway.ask("POST", "/detokenize", {"tokens": list(token_ids)}).get("prompt")
    if not isinstance(text, str):
        raise EngineError("the gateway's answer to /detokenize has no text")
    return text
