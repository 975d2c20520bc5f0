"""Many samples of the base for each of some prompts, with their rewards: the yardstick of the benches."""

import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from harness.completions import MAX_N, Completions
from harness.models import cache_dir
from trimtab_adapters.contract.rewards import RewardInput, RewardModel

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Samples:
    """What was drawn.

    Attributes:
        prompts: The prompts.
        token_ids: Of each sample of each prompt.
    """

    prompts: list[str]
    token_ids: list[list[list[int]]]


@dataclass(frozen=True, slots=True)
class RewardPool:
    """Rewards of samples, one row per prompt.

    Attributes:
        prompts: The prompts.
        rewards: Of the finished samples, `[prompts, samples]`.
        lengths: Tokens of each sample, `[prompts, samples]`.
        partial: By number of tokens, the rewards of the samples cut to so many, `[prompts, samples]`.
    """

    prompts: list[str]
    rewards: Floats
    lengths: NDArray[np.int64]
    partial: Mapping[int, Floats]

    def calibrate(self, prompt: int, rewards: Sequence[float]) -> Floats:
        """Share of the pool of a prompt that scores lower than each reward, ties half."""
        ordered = np.sort(self.rewards[prompt])
        below, not_above = (np.searchsorted(ordered, rewards, side) for side in ("left", "right"))
        return np.asarray((below + not_above) / (2 * ordered.size), dtype=np.float64)

    @property
    def tie_share(self) -> float:
        """Share of pairs of samples of one prompt that have the same reward."""
        _, size = self.rewards.shape
        equal = [float((np.unique(row, return_counts=True)[1] ** 2).sum() - size) for row in self.rewards]
        return float(sum(equal) / len(equal) / (size * (size - 1)))

    def correlations(self) -> dict[int, float]:
        """By number of tokens, the rank correlation of partial and final rewards, averaged over prompts."""
        return {
            number: float(np.mean([spearmanr(*rows).statistic for rows in zip(partial, self.rewards, strict=True)]))
            for number, partial in self.partial.items()
        }


def draw(
    client: Completions, model: str, base: Path, prompts: Sequence[str], num: int, sampling: Mapping[str, Any]
) -> Samples:
    """`num` samples of each prompt, from the cache when the same ones were drawn before.

    Args:
        client: Of the engine. A gateway would log the samples and calibrate with them what they are to judge.
        model: Public name of the base.
        base: Its directory, for the key of the cache.
        prompts: What to continue.
        num: Samples per prompt.
        sampling: Further fields of the request.
    """
    digest = hashlib.sha256((base / "model.safetensors").read_bytes())
    digest.update(json.dumps([list(prompts), num, dict(sampling)], sort_keys=True).encode())
    path = cache_dir() / f"samples-{digest.hexdigest()[:12]}.json.gz"
    if not path.exists():
        asked = {"model": model, "return_token_ids": True, **sampling}
        sizes = [min(MAX_N, num - begin) for begin in range(0, num, MAX_N)]
        answers = client.all([{**asked, "prompt": prompt, "n": n} for prompt in prompts for n in sizes])
        parts = [answers[i : i + len(sizes)] for i in range(0, len(answers), len(sizes))]
        drawn = [[ids for answer in part for ids in answer.token_ids] for part in parts]
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt", encoding="utf-8") as file:
            json.dump(drawn, file)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return Samples(list(prompts), json.load(file))


def score(samples: Samples, reward: RewardModel, tokenizer: Any, checkpoints: Sequence[int] = ()) -> RewardPool:
    """The rewards of all samples, and of what they were after some numbers of tokens.

    Args:
        samples: What to score.
        reward: Scores texts, as the gateway does.
        tokenizer: Makes text of tokens.
        checkpoints: Numbers of tokens.
    """

    def rewards_at(num_tokens: int | None) -> Floats:
        rows = []
        for prompt, drawn in zip(samples.prompts, samples.token_ids, strict=True):
            texts = [tokenizer.decode(ids[:num_tokens], skip_special_tokens=True) for ids in drawn]
            rows.append(reward.score([RewardInput(prompt=prompt, output=text) for text in texts]))
        return np.array(rows)

    return RewardPool(
        prompts=samples.prompts,
        rewards=rewards_at(None),
        lengths=np.array([[len(ids) for ids in drawn] for drawn in samples.token_ids]),
        partial={num: rewards_at(num) for num in checkpoints},
    )
