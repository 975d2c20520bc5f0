"""What all parts of the bench of best-of-N work with: engine, gateway, reward, prompts, samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from harness.completions import Completion, Completions
from harness.sample_pool import RewardPool
from harness.services import MODEL
from harness.strategy_costs import Costs
from trimtab_adapters.contract.rewards import RewardInput, RewardModel

Floats = NDArray[np.float64]
REWARD: Final = "sentiment"
"""Name of the reward in the gateway."""


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What requests gave, `[prompts, requests]` each.

    Attributes:
        calibrated: Calibrated reward of the choice among the pool of its prompt; not what the request was told.
        reward: Its raw reward.
        tokens: Generated for it, all candidates counted.
        reference_tokens: Generated to calibrate.
        wall_s: How long it took, beside the others that ran at the same time.
    """

    calibrated: Floats
    reward: Floats
    tokens: Floats
    reference_tokens: Floats
    wall_s: Floats

    def costs(self, *, with_references: bool = False) -> Costs:
        """Means over the requests of each prompt."""
        tokens = self.tokens + self.reference_tokens if with_references else self.tokens
        return Costs(
            calibrated=self.calibrated.mean(axis=1),
            reward=self.reward.mean(axis=1),
            probability=expit(self.reward).mean(axis=1),
            tokens=tokens.mean(axis=1),
        )


@dataclass(frozen=True, slots=True)
class World:
    """See the module.

    Attributes:
        engine: The engine itself.
        gateway: The gateway before it.
        reward: The reward in this process, the same as in the gateway.
        pool: Samples of the base for each prompt, not used by the gateway.
        sampling: `max_tokens` and the like, the same for all requests.
    """

    engine: Completions
    gateway: Completions
    reward: RewardModel
    pool: RewardPool
    sampling: Mapping[str, Any]

    @property
    def prompts(self) -> list[str]:
        """The prompts of all parts."""
        return self.pool.prompts

    def body(self, prompt: str, seed: int, **fields: Any) -> dict[str, Any]:
        """A request to the gateway."""
        return {"model": MODEL, "prompt": prompt, "seed": seed, **self.sampling, **fields}

    def ranked(self, prompt: str, seed: int, best_of: int, *, calibration: int, **fields: Any) -> dict[str, Any]:
        """A request whose choice is made by the reward; `calibration` 0 ranks by the raw one."""
        ranking = {"best_of": best_of, "reward": REWARD, "calibration": {"size": calibration}}
        return self.body(prompt, seed, **ranking, **fields)

    def ask(self, num_requests: int, *, stream: int = 0, **fields: Any) -> Outcomes:
        """The same ranked request, with other seeds, some times for each prompt.

        Equal numbers of requests of one `stream` use equal seeds, so that strategies see the same candidates.
        """
        begin = 1 + stream * len(self.prompts) * num_requests
        bodies = [
            self.ranked(prompt, (begin + i * num_requests + j) * _SEED_STEP, **fields)
            for i, prompt in enumerate(self.prompts)
            for j in range(num_requests)
        ]
        answers = self.gateway.all(bodies)
        return self.judge([answers[i : i + num_requests] for i in range(0, len(answers), num_requests)])

    def judge(self, answers: Sequence[Sequence[Completion]]) -> Outcomes:
        """The outcomes of answers, one row per prompt, by their first choices."""
        calibrated, rewards = [], []
        for i, (prompt, row) in enumerate(zip(self.prompts, answers, strict=True)):
            scores = self.reward.score([RewardInput(prompt=prompt, output=answer.texts[0]) for answer in row])
            rewards.append(scores)
            calibrated.append(self.pool.calibrate(i, scores))
        return Outcomes(
            calibrated=np.array(calibrated),
            reward=np.array(rewards),
            tokens=np.array([[float(answer.num_tokens) for answer in row] for row in answers]),
            reference_tokens=np.array([[float(answer.num_reference_tokens) for answer in row] for row in answers]),
            wall_s=np.array([[answer.wall_s for answer in row] for row in answers]),
        )


_SEED_STEP = 128
"""Candidates of a request have consecutive seeds; this many lie between two requests."""
