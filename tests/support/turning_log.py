"""A log of rollouts whose outputs carry two rewards, of which one turns as the other rises."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from trimtab_adapters.contract.records import Rollout
from trimtab_adapters.contract.rewards import RewardInput


def rollout(rollout_id: str, prompt: int = 0, **changes: Any) -> Rollout:
    fields: dict[str, Any] = {
        "id": rollout_id,
        "request_id": "req",
        "created_at": 1.0,
        "duration_s": 0.5,
        "route": "base",
        "base_model": "base",
        "endpoint": "completions",
        "prompt": f"prompt {prompt}",
        "prompt_token_ids": [prompt],
        "output_text": "x",
        "output_token_ids": [2],
        "steering": [],
        "sampling": {"temperature": 1.0, "max_tokens": 8},
    }
    return Rollout.model_validate({**fields, **changes})


def turning_rollouts(prompts: int, samples: int, seed: int = 0) -> list[Rollout]:
    """Outputs "u g" with a proxy u in [0, 1] and a gold g that rises with u up to 0.83 and falls steeply behind."""
    rng = np.random.default_rng(seed)
    made = []
    for prompt in range(prompts):
        for sample in range(samples):
            u = rng.random()
            g = u - u**16 + 0.1 * rng.standard_normal()
            made.append(rollout(f"{prompt}-{sample}", prompt, output_text=f"{u} {g}"))
    return made


class WordReward:
    """One word of the output, as a number."""

    def __init__(self, name: str, position: int, version: str = "1") -> None:
        self.name, self.version = name, version
        self._position = position
        self.num_scored = 0

    async def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        self.num_scored += len(inputs)
        return [float(item.output.split()[self._position]) for item in inputs]
