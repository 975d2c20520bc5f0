"""Candidates and their ranking: the values that pass between the request path and a strategy.

A *candidate* is one generated answer to one prompt; a *choice* is a candidate that the caller gets. Nothing here
knows HTTP or SQL.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from trimtab_adapters.contract.errors import TrimtabError
from trimtab_adapters.contract.records import RewardValue
from trimtab_server.engine.base import Candidate

ABORTED = "abort"
"""Finish reason of a candidate that was stopped before its end; vLLM's own word."""

CandidateState = Literal["complete", "stopped", "late"]
"""`stopped` has no end, `late` came to its end after the answer was decided."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Where one candidate stands among all candidates of its prompt.

    Attributes:
        candidate: The candidate.
        reward: Its raw and calibrated reward; None when no reward ranked, or of an unfinished candidate.
        rank: 0 for the best; the first `n` are the choices.
        num_candidates: How many candidates of this prompt there were.
        state: Only what is `complete` can be a choice.
    """

    candidate: Candidate
    reward: RewardValue | None
    rank: int
    num_candidates: int
    state: CandidateState = "complete"


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A candidate that could not be generated or scored, where the caller wants to do without.

    Attributes:
        index: Its number among the candidates of its prompt.
        error: What went wrong.
    """

    index: int
    error: TrimtabError


class ReferenceDraw(Protocol):
    """Draws from the reference policy: the base model without steering, same prompt and sampling settings."""

    @property
    def key(self) -> str:
        """Identifies base model, steering of the reference policy (none) and sampling settings; not the prompt."""
        ...

    async def __call__(self, num: int) -> list[Candidate]:
        """Draw `num` unsteered candidates of the prompt."""
        ...


Scored = tuple[Candidate, RewardValue | None]
"""A finished candidate and its reward, where one was asked for."""


def ranked(scored: Sequence[Scored], others: Sequence[tuple[Candidate, CandidateState]] = ()) -> list[Selection]:
    """All candidates, best first: by calibrated reward, then raw reward, then mean log-probability, then number.

    Calibration keeps the order of the raw rewards of one prompt, ties aside, so it never costs the best candidate; it
    tells how good the choice is on a scale that means the same for every prompt. Without a reward the mean
    log-probability ranks, as OpenAI's `best_of` does.

    Args:
        scored: The finished candidates.
        others: Those that cannot be chosen; they come last, in the order of their numbers.
    """
    return in_given_order(sorted(scored, key=_worst_last), others)


def in_given_order(
    scored: Sequence[Scored], others: Sequence[tuple[Candidate, CandidateState]] = ()
) -> list[Selection]:
    """Selections whose ranks are the order of `scored`, the choices first."""
    total = len(scored) + len(others)
    best = [Selection(candidate, value, rank, total) for rank, (candidate, value) in enumerate(scored)]
    last = sorted(others, key=lambda item: item[0].index)
    return best + [
        Selection(candidate, None, len(scored) + i, total, state) for i, (candidate, state) in enumerate(last)
    ]


def _worst_last(scored: Scored) -> tuple[float, float, float, int]:
    """Sort key, smallest for the best. Rewards are finite; a log-probability that is NaN counts as the lowest."""
    candidate, value = scored
    mean_logprob = candidate.mean_logprob
    if math.isnan(mean_logprob):
        mean_logprob = -math.inf
    if value is None:
        return 0.0, 0.0, -mean_logprob, candidate.index
    return -(value.calibrated or 0.0), -value.raw, -mean_logprob, candidate.index
