"""From the log to samples with rewards: which logged rollouts a run may learn from, and what they earned."""

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab_adapters.contract.records import Rollout
from trimtab_training.config import TrainConfig
from trimtab_training.logged_rewards import samples_of, score_logged
from trimtab_training.logged_rollouts import RolloutSieve, same_draw, same_output
from trimtab_training.models import Vocabulary
from trimtab_training.prompts import Prompt, is_held_out, prompt_text, same_prompt
from trimtab_training.rewards import Scorer
from trimtab_training.rollouts import Sample
from trimtab_training.sampling_settings import model_defaults, off_policy_reason
from trimtab_training.transforms import RewardTransform


class LogIntake:
    """Sifts the logged rollouts of a run.

    Args:
        config: Of the run.
        vocabulary: Decodes prompts that were sent as token ids.
        is_on_policy: Whether the objective weighs rollouts by their probability, and so needs to know it; a pool takes
            what anybody said.
    """

    def __init__(self, config: TrainConfig, vocabulary: Vocabulary, *, is_on_policy: bool) -> None:
        self._config = config
        self._vocabulary = vocabulary
        self._is_on_policy = is_on_policy
        self._defaults: Mapping[str, Any] = model_defaults(config.models.base_model)

    def whole_requests(self, rollouts: Sequence[Rollout]) -> RolloutSieve:
        """The rollouts that training can use at all: of requests that are complete, and of base and adapters alone."""
        sieve = RolloutSieve(rollouts)
        sieve.leave_out_incomplete()
        if not self._config.logged.with_operators:
            sieve.leave_out_requests(lambda rollout: None if rollout.is_plain else "operators")
        return sieve

    def sift(
        self,
        sieve: RolloutSieve,
        *,
        train: Sequence[Prompt],
        held_out: Sequence[Prompt],
        transform: RewardTransform,
    ) -> None:
        """Leave out what is held out, what has no rank or rating, what is off policy and what repeats."""
        sides = dict.fromkeys((same_prompt(prompt.text) for prompt in train), False)
        sides |= dict.fromkeys((same_prompt(prompt.text) for prompt in held_out), True)
        share, seed = self._config.evaluation.share, self._config.seed

        def of_prompt(rollout: Rollout) -> str | None:
            text = prompt_text(rollout, self._vocabulary)
            # A prompt that the run does not have may come to another one, whose held-out prompts must be new to it.
            if sides.get(same_prompt(text), is_held_out(text, share, seed=seed)):
                return "held_out"
            return None if transform.knows(text) else "no_reference"

        sieve.leave_out(of_prompt)
        if self._is_on_policy:
            sieve.leave_out_requests(lambda rollout: off_policy_reason(rollout, self._defaults))
        sieve.leave_out_repeats(same_draw if self._is_on_policy else same_output)
        if self._config.reward.source == "feedback":
            sieve.leave_out(lambda rollout: "unrated" if rollout.rating is None else None)

    def rewarded(self, rollouts: Sequence[Rollout], scorer: Scorer) -> tuple[list[Sample], list[float]]:
        """The rollouts as samples, and their rewards: ratings where people give them, the scorer's elsewhere."""
        samples = samples_of(rollouts, self._vocabulary, self._defaults)
        if self._config.reward.source == "feedback":
            return samples, [rating for rollout in rollouts if (rating := rollout.rating) is not None]
        return samples, score_logged(rollouts, samples, scorer)
