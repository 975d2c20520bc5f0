"""Looks at all schedules now and then and posts the jobs that are due."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from pydantic import ValidationError

from trimtab_adapters.contract.errors import TrimtabError
from trimtab_server.schedules.drift import compare_windows
from trimtab_server.schedules.triggers import Triggers
from trimtab_server.storage.traffic import RewardWindows
from trimtab_server.storage.training_schedules import MOST_RUNS, TrainingSchedule, TrainingSchedules

logger = logging.getLogger(__name__)

INTERVAL_S = 30.0
_S_PER_HOUR = 3600.0


class Traffic(Protocol):
    """What the rollout log tells about a route."""

    async def num_usable(self, route: str, since: float) -> int:
        """See `SqlTraffic`."""
        ...

    async def reward_windows(self, route: str, since: float, *, reward: str, window: int) -> RewardWindows | None:
        """See `SqlTraffic`."""
        ...


class Scheduler:
    """Posts jobs. Any number may run over one database: each job is posted once.

    What counts begins where the schedule's last job ended: while a job runs, its own draws are among the route's
    rollouts, so that rollouts of that time make no schedule due. The job after it reads them all the same.

    Args:
        schedules: Where they are kept.
        traffic: What they look at.
        interval_s: Seconds between two looks.
        clock: Unix seconds.
    """

    def __init__(
        self,
        schedules: TrainingSchedules,
        traffic: Traffic,
        *,
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._schedules = schedules
        self._traffic = traffic
        self._interval_s = interval_s
        self._clock = clock

    async def run(self) -> None:
        """Look until cancelled; a look that fails is logged and made again."""
        while True:
            await self.look()
            await asyncio.sleep(self._interval_s)

    async def look(self) -> Sequence[str]:
        """Look at each schedule once; returns the ids of the jobs that were posted."""
        posted = []
        try:
            for schedule in await self._schedules.list(num_runs=MOST_RUNS):
                if not (schedule.is_paused or schedule.is_running) and (job_id := await self._look_at(schedule)):
                    posted.append(job_id)
        except TrimtabError as exc:
            logger.error("the training schedules could not be looked at: %s", exc.message)
        return posted

    async def _look_at(self, schedule: TrainingSchedule) -> str | None:
        try:
            findings = await self._find(schedule, Triggers.model_validate(schedule.triggers))
            await self._schedules.note_look(schedule.name, {"at": self._clock(), **findings})
        except (TrimtabError, ValidationError) as exc:  # triggers that another version wrote; the other schedules go on
            logger.error("the training schedule %s could not be looked at: %s", schedule.name, exc)
            return None
        due = {name: finding for name, finding in findings.items() if finding["is_due"]}
        if not due:
            return None
        job_id = await self._schedules.post(schedule, due)
        if job_id is not None:
            logger.info("the training schedule %s posted %s: %s", schedule.name, job_id, ", ".join(due))
        return job_id

    async def _find(self, schedule: TrainingSchedule, triggers: Triggers) -> dict[str, Any]:
        """What each trigger sees, with `is_due`."""
        last = schedule.runs[0] if schedule.runs else None
        since = last.updated_at if last else schedule.created_at
        findings: dict[str, Any] = {}
        every, drift, route = triggers.every, triggers.drift, triggers.route or ""
        if every is not None and every.hours is not None:
            hours = (self._clock() - (last.created_at if last else schedule.created_at)) / _S_PER_HOUR
            findings["hours"] = {"is_due": hours >= every.hours, "hours": hours}
        if every is not None and every.new_rollouts is not None:
            num = await self._traffic.num_usable(route, since)
            findings["new_rollouts"] = {"is_due": num >= every.new_rollouts, "num": num}
        if drift is not None:
            trained_at, answered = _last_success(schedule)
            windows = await self._traffic.reward_windows(route, trained_at, reward=drift.reward, window=drift.window)
            findings["drift"] = _drift(windows, drift.false_alarm, answered) if windows else {"is_due": False}
        return findings


def _last_success(schedule: TrainingSchedule) -> tuple[float, int]:
    """When the last job that succeeded ended, and the newest window that a job was posted for since then.

    A job that failed leaves the adapter as it was: what is compared stays, but each window has one job at most.
    """
    answered = 0
    for run in schedule.runs:
        if run.state == "succeeded":
            return run.updated_at, answered
        answered = max(answered, int(run.reason.get("drift", {}).get("window", 0)))
    return schedule.created_at, answered


def _drift(windows: RewardWindows, false_alarm: float, answered: int) -> dict[str, Any]:
    found = compare_windows(windows.older, windows.newer)
    return {
        "is_due": found.p_value < false_alarm and windows.number > answered,
        "reward_version": windows.version,
        "window": windows.number,
        "older_mean": found.older_mean,
        "newer_mean": found.newer_mean,
        "p_value": found.p_value,
    }
