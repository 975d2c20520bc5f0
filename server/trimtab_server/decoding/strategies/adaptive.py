"""Adaptive N: candidates are drawn in waves until one of them is good enough.

What ends a wave is decided on a clock that counts tokens, not seconds: the candidate that passes with the fewest
tokens ends it, and every longer candidate of the wave is out. In a batch all candidates grow at the same pace, so that
is when one would stop them anyway; but the choice depends on the candidates alone, so the same seed gives the same
answer however busy the machine is.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from trimtab_adapters.contract.selection import Adaptive
from trimtab_server.decoding.candidates import CandidateState, Scored, ranked
from trimtab_server.decoding.job import PromptResult
from trimtab_server.decoding.prompt_run import PromptRun
from trimtab_server.decoding.running import RunningCandidate
from trimtab_server.decoding.strategies.threshold import threshold_of
from trimtab_server.engine.base import Candidate


@dataclass(slots=True)
class _Drawn:
    """What has been drawn so far."""

    scored: list[Scored] = field(default_factory=list)
    others: list[tuple[Candidate, CandidateState]] = field(default_factory=list)

    def num_passing(self, threshold: float) -> int:
        """Candidates that are good enough."""
        return sum(value is not None and (value.calibrated or 0.0) >= threshold for _, value in self.scored)


async def adaptive(run: PromptRun, params: Adaptive) -> PromptResult:
    """Draw until there are as many good candidates as choices, at most N; the best of all complete ones first."""
    threshold = threshold_of(params, run.num_candidates, run.job.num_rollouts)
    drawn, num_started = _Drawn(), 0
    while num_started < run.num_candidates and (missing := run.n - drawn.num_passing(threshold)) > 0:
        # At least as many as there must be choices: with fewer the answer would lack some even if all pass.
        num = max(params.wave, run.n - len(drawn.scored) if not drawn.scored else 1)
        wave = range(num_started, min(num_started + num, run.num_candidates))
        num_started = wave.stop
        await _Wave(run, threshold, missing, drawn).run_all(wave)
    result = PromptResult(ranked(drawn.scored, drawn.others))
    result.outcome = {
        "threshold": threshold,
        "is_met": drawn.num_passing(threshold) >= run.n,
        "num_stopped": sum(state == "stopped" for _, state in drawn.others),
    }
    return result


class _Wave:
    """Candidates that are generated at the same time."""

    def __init__(self, run: PromptRun, threshold: float, missing: int, drawn: _Drawn) -> None:
        self._run = run
        self._threshold = threshold
        self._missing = missing
        self._drawn = drawn
        self._running: list[RunningCandidate] = []
        self._passing_lengths: list[int] = []

    async def run_all(self, indices: Sequence[int]) -> None:
        """Generate and score them; those that come to their end too late are stopped."""
        if len(indices) == 1:  # nobody to be stopped
            self._drawn.scored += await self._run.score(await self._run.generate(indices))
            return
        self._running = [self._run.start(index) for index in indices]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._follow(running)) for running in self._running]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        limit = self._limit
        for task, running in zip(tasks, self._running, strict=True):
            scored = task.result()
            if scored is None:
                continue
            if running.is_stopped:
                self._drawn.others.append((scored[0], "stopped"))
            elif limit is not None and len(scored[0].token_ids) > limit:
                self._drawn.others.append((scored[0], "late"))
            else:
                self._drawn.scored.append(scored)

    @property
    def _limit(self) -> int | None:
        """Tokens after which the wave is decided; None while it is not."""
        if len(self._passing_lengths) < self._missing:
            return None
        return sorted(self._passing_lengths)[self._missing - 1]

    async def _follow(self, running: RunningCandidate) -> Scored | None:
        """Wait for a candidate and its reward; None when it is left out."""
        candidate = await self._run.result(running)
        if candidate is None:
            return (await running.stopped(), None) if running.is_stopped else None
        scored = await self._run.score([candidate])
        if not scored:
            return None
        value = scored[0][1]
        if value is not None and (value.calibrated or 0.0) >= self._threshold:
            self._passing_lengths.append(len(candidate.token_ids))
            if (limit := self._limit) is not None:
                for other in self._running:
                    other.limit(limit)
        return scored[0]
