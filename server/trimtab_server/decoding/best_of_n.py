"""Best-of-N: all candidates are generated, the best `n` become choices."""

import math
from collections.abc import Sequence

from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_adapters.contract.records import RewardValue
from trimtab_server.decoding.candidates import ReferenceDraw, Selection
from trimtab_server.decoding.scoring import CalibrationChoice, Scoring
from trimtab_server.engine.base import Candidate


class BestOfN:
    """Ranks by calibrated reward when a reward is named, else by mean log-probability as OpenAI's `best_of` does.

    Calibration keeps the order of the raw rewards of one prompt, ties aside, so it never costs the best candidate; it
    tells how good the choice is on a scale that means the same for every prompt. Among equal calibrated rewards the
    raw reward decides, then the mean log-probability, then the order of generation.

    Args:
        scoring: Scores candidates.
    """

    def __init__(self, scoring: Scoring) -> None:
        self._scoring = scoring

    async def select(
        self,
        *,
        prompt: str,
        prompt_token_ids: Sequence[int],
        candidates: Sequence[Candidate],
        n: int,
        reward: str | None,
        draw_reference: ReferenceDraw,
        calibration_size: int | None,
    ) -> list[Selection]:
        """All candidates of one prompt, best first; the first `n` are the choices. See `Selector.select`.

        Raises:
            InvalidRequestError: `n` is not between 1 and the number of candidates, or the calibration size negative.
            NotFoundError: No reward of that name is registered.
            RewardError: A candidate or reference rollout could not be scored.
            EngineError: The reference rollouts could not be drawn.
        """
        if not 1 <= n <= len(candidates):
            raise InvalidRequestError(f"n must be between 1 and best_of ({len(candidates)})", param="n")
        rewards: Sequence[RewardValue | None] = [None] * len(candidates)
        if reward is not None:
            scorer = await self._scoring.for_prompt(
                reward,
                calibration=CalibrationChoice(size=calibration_size),
                prompt=prompt,
                prompt_token_ids=prompt_token_ids,
                draw_reference=draw_reference,
            )
            rewards = await scorer.score([candidate.text for candidate in candidates])
        ranked = sorted(zip(candidates, rewards, strict=True), key=_worst_last)
        return [
            Selection(candidate=candidate, reward=value, rank=rank, num_candidates=len(candidates))
            for rank, (candidate, value) in enumerate(ranked)
        ]


def _worst_last(scored: tuple[Candidate, RewardValue | None]) -> tuple[float, float, float, int]:
    """Sort key, smallest for the best. Rewards are finite; a log-probability that is NaN counts as the lowest."""
    candidate, value = scored
    mean_logprob = candidate.mean_logprob
    if math.isnan(mean_logprob):
        mean_logprob = -math.inf
    if value is None:
        return 0.0, 0.0, -mean_logprob, candidate.index
    return -(value.calibrated or 0.0), -value.raw, -mean_logprob, candidate.index
