"""What came of the requests of a canary and of those beside it."""

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class ArmOutcomes:
    """Running sums over the requests of one arm.

    Attributes:
        num_answers: Requests that were answered.
        num_errors: Requests that failed by a fault of the server (status 500 and above).
        num_rewards: Answers with a reward.
        mean: Of the rewards; 0 without any.
    """

    num_answers: int = 0
    num_errors: int = 0
    num_rewards: int = 0
    mean: float = 0.0
    _squares: float = 0.0

    @property
    def num_requests(self) -> int:
        """Answered and failed."""
        return self.num_answers + self.num_errors

    @property
    def variance(self) -> float:
        """Of the rewards, with the denominator num_rewards - 1; 0 for fewer than two."""
        return self._squares / (self.num_rewards - 1) if self.num_rewards > 1 else 0.0

    def answered(self, reward: float | None) -> None:
        """Count an answer, with its reward where it has one."""
        self.num_answers += 1
        if reward is None or not math.isfinite(reward):
            return
        self.num_rewards += 1  # Welford's update: no difference of large sums
        before = reward - self.mean
        self.mean += before / self.num_rewards
        self._squares += before * (reward - self.mean)

    def failed(self) -> None:
        """Count an error."""
        self.num_errors += 1

    def to_json(self) -> dict[str, Any]:
        """As the admin API shows it."""
        return {
            "num_answers": self.num_answers,
            "num_errors": self.num_errors,
            "num_rewards": self.num_rewards,
            "mean_reward": self.mean if self.num_rewards else None,
        }


@dataclass(slots=True)
class CanaryOutcomes:
    """Both arms of one revision of a route, and how often they were compared.

    Attributes:
        canary: Requests that the new version answered.
        stable: Requests beside them.
        num_looks: Comparisons so far.
    """

    canary: ArmOutcomes = field(default_factory=ArmOutcomes)
    stable: ArmOutcomes = field(default_factory=ArmOutcomes)
    num_looks: int = 0
