"""Schedules of training jobs and what they posted.

The database alone decides whether a schedule may post a job, in one transaction: of several gateways that find it due
at once one posts, and a schedule has at most one job that has not ended.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, RowMapping, delete, select, update

from trimtab_adapters.contract.errors import ConflictError, NotFoundError
from trimtab_server.storage.base import JobState
from trimtab_server.storage.database import Database
from trimtab_server.storage.jobs import insert_job
from trimtab_server.storage.tables import training_jobs, training_schedule_runs, training_schedules

_ENDED = ("succeeded", "failed", "cancelled")
MOST_RUNS = 100
"""Newest jobs of a schedule that are told."""


@dataclass(frozen=True, slots=True)
class ScheduleRun:
    """A job that a schedule posted.

    Attributes:
        job_id: Of the job.
        state: The job's.
        reason: What made it due.
        created_at: When it was posted, Unix seconds.
        updated_at: When the job last changed: of one that has ended, its end.
    """

    job_id: str
    state: JobState
    reason: dict[str, Any]
    created_at: float
    updated_at: float

    @property
    def has_ended(self) -> bool:
        """Whether another may be posted."""
        return self.state in _ENDED


@dataclass(frozen=True, slots=True)
class TrainingSchedule:
    """A schedule.

    Attributes:
        name: Unique.
        config: Configuration of its jobs.
        triggers: As JSON, see `schedules.triggers.Triggers`.
        is_paused: Whether it posts nothing for now.
        created_at: Unix seconds.
        updated_at: Likewise.
        last_look: What the last look at the triggers found; empty before the first.
        runs: The newest jobs, newest first.
    """

    name: str
    config: dict[str, Any]
    triggers: dict[str, Any]
    is_paused: bool
    created_at: float
    updated_at: float
    last_look: dict[str, Any]
    runs: tuple[ScheduleRun, ...] = field(default=())

    @property
    def is_running(self) -> bool:
        """Whether its last job has not ended."""
        return bool(self.runs) and not self.runs[0].has_ended


class TrainingSchedules:
    """Schedules in the database.

    Args:
        database: Migrated.
        clock: Unix seconds.
    """

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    async def add(self, name: str, config: Mapping[str, Any], triggers: Mapping[str, Any]) -> TrainingSchedule:
        """Add a schedule; it counts from now on. Raises `ConflictError` when the name is taken."""
        now = self._clock()
        row = {
            "name": name,
            "config": dict(config),
            "triggers": dict(triggers),
            "is_paused": False,
            "created_at": now,
            "updated_at": now,
            "last_look": {},
        }
        insert = (
            self._database.insert(training_schedules)
            .values(row)
            .on_conflict_do_nothing(index_elements=["name"])
            .returning(training_schedules.c.name)
        )

        def work(connection: Connection) -> TrainingSchedule:
            if connection.execute(insert).scalar_one_or_none() is None:
                raise ConflictError(f"there is a training schedule `{name}` already; delete it first", param="name")
            return _get(connection, name)

        return await self._database.write(work)

    async def get(self, name: str) -> TrainingSchedule:
        """With its newest jobs. Raises `NotFoundError`."""
        return await self._database.read(lambda connection: _get(connection, name))

    async def list(self, *, num_runs: int = 1) -> Sequence[TrainingSchedule]:
        """All of them by name, each with its newest jobs."""

        def fetch(connection: Connection) -> list[TrainingSchedule]:
            names = connection.execute(select(training_schedules.c.name).order_by(training_schedules.c.name)).scalars()
            return [_get(connection, name, num_runs=num_runs) for name in names.all()]

        return await self._database.read(fetch)

    async def delete(self, name: str) -> None:
        """Forget a schedule and its history; its jobs stay, also one that runs. Raises `NotFoundError`."""

        def work(connection: Connection) -> None:
            _get(connection, name, num_runs=0, for_update=True)
            connection.execute(delete(training_schedules).where(training_schedules.c.name == name))

        await self._database.write(work)

    async def pause(self, name: str, is_paused: bool) -> TrainingSchedule:
        """Let a schedule post nothing, or go on. Raises `NotFoundError`."""
        return await self._update(name, {"is_paused": is_paused, "updated_at": self._clock()})

    async def note_look(self, name: str, look: Mapping[str, Any]) -> TrainingSchedule:
        """Keep what a look found. Raises `NotFoundError`."""
        return await self._update(name, {"last_look": dict(look)})

    async def post(self, schedule: TrainingSchedule, reason: Mapping[str, Any]) -> str | None:
        """Post the schedule's job; returns its id.

        Args:
            schedule: As it was when it was found due.
            reason: What made it due.

        Returns:
            None when it may not post now: it was deleted, paused or changed, or has posted meanwhile.
        """
        last = schedule.runs[0].job_id if schedule.runs else None

        def work(connection: Connection) -> str | None:
            try:
                now = _get(connection, schedule.name, num_runs=1, for_update=True)
            except NotFoundError:
                return None
            is_same = now.created_at == schedule.created_at and (now.runs[0].job_id if now.runs else None) == last
            if now.is_paused or now.is_running or not is_same:
                return None
            created_at = self._clock()
            job_id = insert_job(connection, now.config, name=f"{now.name} (scheduled)", now=created_at)
            run = {"job_id": job_id, "schedule": now.name, "reason": dict(reason), "created_at": created_at}
            connection.execute(training_schedule_runs.insert().values(run))
            return job_id

        return await self._database.write(work)

    async def _update(self, name: str, values: Mapping[str, Any]) -> TrainingSchedule:
        def work(connection: Connection) -> TrainingSchedule:
            _get(connection, name, num_runs=0, for_update=True)
            connection.execute(update(training_schedules).where(training_schedules.c.name == name).values(values))
            return _get(connection, name)

        return await self._database.write(work)


def _get(connection: Connection, name: str, *, num_runs: int = MOST_RUNS, for_update: bool = False) -> TrainingSchedule:
    statement = select(training_schedules).where(training_schedules.c.name == name)
    if for_update:
        statement = statement.with_for_update()
    row = connection.execute(statement).mappings().one_or_none() if "\x00" not in name else None
    if row is None:
        raise NotFoundError(f"The training schedule `{name}` does not exist", code="schedule_not_found")
    runs = training_schedule_runs.c
    history = (
        select(runs.job_id, training_jobs.c.state, runs.reason, runs.created_at, training_jobs.c.updated_at)
        .join_from(training_schedule_runs, training_jobs, runs.job_id == training_jobs.c.id)
        .where(runs.schedule == name)
        .order_by(runs.created_at.desc(), runs.job_id)
        .limit(num_runs)
    )
    return TrainingSchedule(**row, runs=tuple(_run(run) for run in connection.execute(history).mappings()))


def _run(row: RowMapping) -> ScheduleRun:
    return ScheduleRun(**row)
