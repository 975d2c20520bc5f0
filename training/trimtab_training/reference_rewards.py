"""Rewards of the base's own outputs for each training prompt: what calibrates a reward in training.

They are read from the log or drawn once, at the start of a run, and kept with it: a resumed run must give a reward the
rank that it had before.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from trimtab_adapters.contract.calibration import EmpiricalCalibrator
from trimtab_adapters.contract.errors import IntegrityError
from trimtab_training.durable_files import write_whole
from trimtab_training.prompts import Prompt
from trimtab_training.rewards import Scorer
from trimtab_training.rollouts import RolloutSource
from trimtab_training.sample_pools import draw_in_parts


def draw_reference_scores(
    source: RolloutSource,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    *,
    size: int,
    seed: int,
    known: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, list[float]]:
    """Rewards of `size` outputs of the base for each prompt, by prompt text.

    Args:
        source: Draws.
        scorer: Gives rewards.
        prompts: Distinct by their text.
        size: Rewards per prompt.
        seed: Of the draws.
        known: Rewards of outputs that need not be drawn any more, at most `size` for a prompt.
    """
    scores: dict[str, list[float]] = {prompt.key: list((known or {}).get(prompt.key, ())) for prompt in prompts}
    by_number: dict[int, list[Prompt]] = {}
    for prompt in prompts:
        by_number.setdefault(len(scores[prompt.key]), []).append(prompt)
    for num_known, group in sorted(by_number.items()):
        # What is known may have been drawn with this very seed by an earlier run; it must not come again.
        group_seed = [seed, num_known] if num_known else seed
        drawn = _draw(source, scorer, group, size=size - num_known, seed=np.random.SeedSequence(group_seed))
        for prompt in group:
            scores[prompt.key] += drawn[prompt.key]
    return scores


def _draw(
    source: RolloutSource, scorer: Scorer, prompts: Sequence[Prompt], *, size: int, seed: np.random.SeedSequence
) -> dict[str, list[float]]:
    scores: dict[str, list[float]] = {prompt.key: [] for prompt in prompts}
    for drawn in draw_in_parts(source, prompts, size=size, seed=seed, steered=False):
        samples = [sample for group in drawn for sample in group]
        rewards = iter(scorer.score([sample.reward_input for sample in samples]).rewards)
        for prompt, group in zip(prompts, drawn, strict=True):
            scores[prompt.key].extend(next(rewards) for _ in group)
    return scores


def save_reference_scores(path: Path, scores: Mapping[str, Sequence[float]]) -> None:
    """Write the rewards of a run's reference rollouts."""
    write_whole(path, json.dumps({prompt: list(values) for prompt, values in scores.items()}))


def load_reference_scores(path: Path, *, reward: str) -> dict[str, EmpiricalCalibrator]:
    """Read what `save_reference_scores` wrote, as one calibrator per prompt.

    Raises:
        IntegrityError: It cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {
            prompt: EmpiricalCalibrator.fit(scores, reference="base", reward=reward) for prompt, scores in found.items()
        }
    except (OSError, ValueError, AttributeError, TypeError) as exc:
        raise IntegrityError(f"the reference rewards of the run in {path} cannot be read: {exc}") from exc
