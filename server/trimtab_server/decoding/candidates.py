"""Candidates and their ranking: the values that pass between the request path and a best-of-N selector.

A *candidate* is one generated answer to one prompt; a *choice* is a candidate that the caller gets. Nothing here
knows HTTP or SQL.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from trimtab_adapters.contract.records import RewardValue
from trimtab_server.engine.base import Candidate


@dataclass(frozen=True, slots=True)
class Selection:
    """Where one candidate stands among all candidates of its prompt.

    Attributes:
        candidate: The candidate.
        reward: Its raw and calibrated reward; None when no reward ranked.
        rank: 0 for the best.
        num_candidates: How many candidates of this prompt were ranked.
    """

    candidate: Candidate
    reward: RewardValue | None
    rank: int
    num_candidates: int


class ReferenceDraw(Protocol):
    """Draws from the reference policy: the base model without steering, same prompt and sampling settings."""

    @property
    def key(self) -> str:
        """Identifies base model, steering of the reference policy (none) and sampling settings; not the prompt."""
        ...

    async def __call__(self, num: int) -> list[Candidate]:
        """Draw `num` unsteered candidates of the prompt."""
        ...


class Selector(Protocol):
    """Ranks candidates: by calibrated reward when a reward is named, else by mean log-probability."""

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
        """Rank all candidates of one prompt, best first; the first `n` are the choices.

        Args:
            prompt: The prompt as text.
            prompt_token_ids: The prompt as the engine saw it.
            candidates: All of them; at least `n`.
            n: Number of choices.
            reward: Name of a registered reward; None ranks by mean log-probability.
            draw_reference: Draws reference rollouts for a per-prompt calibrator.
            calibration_size: Number of reference rollouts; None means the selector's default, 0 no calibration.

        Raises:
            NotFoundError: No reward of that name is registered.
            RewardError: A candidate could not be scored. A missing reward is never 0.
        """
        ...
