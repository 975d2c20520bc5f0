"""Watches the canaries of a gateway's routes and ends them."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from trimtab_adapters.contract.errors import ConflictError, NotFoundError, TrimtabError
from trimtab_server.canary.decision import CanaryRule, Verdict, decide
from trimtab_server.canary.outcomes import ArmOutcomes, CanaryOutcomes
from trimtab_server.decoding.job import JobResult
from trimtab_server.errors import error_answer
from trimtab_server.sse import ClientDisconnectedError
from trimtab_server.storage.base import ResolvedModel, RouteRevision

logger = logging.getLogger(__name__)

_SERVER_FAULT = 500


class CanaryRoutes(Protocol):
    """The routes, and how a canary ends; `SqlCanaries` is one."""

    async def routes(self) -> Sequence[RouteRevision]:
        """The current revision of each."""
        ...

    async def end_canary(self, route: str, revision: int, *, is_promoted: bool, comment: str) -> RouteRevision:
        """Make the canary's steering the route's, or drop it.

        Raises:
            ConflictError: The current revision is another.
            NotFoundError: The route is gone.
        """
        ...


class CanaryWatcher:
    """Counts what comes of requests and ends each canary in time.

    What it knows is in memory: of several gateways over one database each judges the answers that it gave, and the
    first with a verdict ends the canary for all; a gateway that starts anew begins to count anew, while time runs on.

    Args:
        routes: What there is to watch.
        clock: Unix seconds.
        interval_s: Between two looks.
    """

    def __init__(
        self, routes: CanaryRoutes, *, clock: Callable[[], float] = time.time, interval_s: float = 1.0
    ) -> None:
        self._routes = routes
        self._clock = clock
        self._interval_s = interval_s
        self._outcomes: dict[tuple[str, int], CanaryOutcomes] = {}

    def answered(self, result: JobResult) -> None:
        """Count a complete answer."""
        if (arm := self._arm(result.job.resolved)) is not None:
            arm.answered(_reward_of(result))

    def failed(self, resolved: ResolvedModel, error: BaseException) -> None:
        """Count an error, unless it is the caller's, or the caller went away."""
        is_fault = isinstance(error, Exception) and not isinstance(error, ClientDisconnectedError | OSError)
        if is_fault and error_answer(error).status >= _SERVER_FAULT and (arm := self._arm(resolved)) is not None:
            arm.failed()

    def outcomes(self, revision: RouteRevision) -> CanaryOutcomes:
        """What came of the requests of a revision so far, of this gateway's."""
        return self._outcomes.get((revision.route, revision.revision), CanaryOutcomes())

    async def run(self) -> None:
        """Look again and again, for ever."""
        while True:
            await asyncio.sleep(self._interval_s)
            await self.look()

    async def look(self) -> None:
        """End every canary that is over."""
        running = [revision for revision in await self._routes.routes() if revision.canary is not None]
        current = {(revision.route, revision.revision) for revision in running}
        self._outcomes = {key: outcomes for key, outcomes in self._outcomes.items() if key in current}
        for revision in running:
            verdict = self._verdict(revision)
            if verdict.action != "wait":
                await self._end(revision, verdict)

    def _verdict(self, revision: RouteRevision) -> Verdict:
        canary = revision.canary
        assert canary is not None
        outcomes = self._outcomes.setdefault((revision.route, revision.revision), CanaryOutcomes())
        rule = CanaryRule(canary.num_answers, canary.min_answers, canary.timeout_s)
        return decide(outcomes, rule, self._clock() - revision.created_at)

    async def _end(self, revision: RouteRevision, verdict: Verdict) -> None:
        is_promoted = verdict.action == "promote"
        version = revision.canary.version if revision.canary is not None else ""
        comment = f"canary {version} {'promoted' if is_promoted else 'rolled back'}: {verdict.reason}"
        try:
            await self._routes.end_canary(revision.route, revision.revision, is_promoted=is_promoted, comment=comment)
        except (ConflictError, NotFoundError):
            logger.info("the route %s was changed meanwhile; its canary ended with that", revision.route)
        except TrimtabError as exc:  # the next look tries again
            logger.error("the canary of the route %s could not be ended: %s", revision.route, exc.message)
        else:
            logger.log(logging.INFO if is_promoted else logging.WARNING, "route %s: %s", revision.route, comment)

    def _arm(self, resolved: ResolvedModel) -> ArmOutcomes | None:
        if (arm := resolved.canary) is None:
            return None
        outcomes = self._outcomes.setdefault((resolved.model, arm.revision), CanaryOutcomes())
        return outcomes.canary if arm.is_canary else outcomes.stable


def _reward_of(result: JobResult) -> float | None:
    """Mean raw reward of the choices; None unless the route's own reward ranked all of them."""
    if result.job.reward is None or result.job.reward != result.job.resolved.reward:
        return None
    rewards = [selection.reward for _, selection in result.choices()]
    raw = [reward.raw for reward in rewards if reward is not None]
    return sum(raw) / len(raw) if raw and len(raw) == len(rewards) else None
