"""The queue of training jobs: each is worked on by one worker at a time.

queued ──claim──> running ──finish──> succeeded | failed
   └────cancel──────┴──> cancelled
running ──claim, when its heartbeat is older than the lease──> running, by another worker
"""

import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, RowMapping, select, update

from trimtab_adapters.contract.errors import ConflictError, NotFoundError
from trimtab_server.storage.base import JobState, TrainingJob
from trimtab_server.storage.database import Database
from trimtab_server.storage.tables import training_jobs

LEASE_S = 120.0
"""A worker that was not heard of for this long is taken for dead."""
_JOB_ID = re.compile(r"job-[0-9a-f]{32}")

_FIELDS = tuple(
    training_jobs.c[name]
    for name in (
        "id",
        "state",
        "config",
        "created_at",
        "updated_at",
        "worker",
        "progress",
        "version",
        "evaluation",
        "error",
        "name",
    )
)


class TrainingJobs:
    """Training jobs in the database.

    Args:
        database: Migrated.
        lease_s: How old a heartbeat may be before another worker may claim the job, in seconds.
        clock: Unix seconds.
    """

    def __init__(self, database: Database, *, lease_s: float = LEASE_S, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._lease_s = lease_s
        self._clock = clock

    async def submit(self, config: Mapping[str, Any], *, name: str = "") -> TrainingJob:
        """Queue a job."""
        now, job_id = self._clock(), f"job-{uuid.uuid4().hex}"
        row = {
            "id": job_id,
            "name": name,
            "state": "queued",
            "config": dict(config),
            "created_at": now,
            "updated_at": now,
            "progress": {},
            "evaluation": {},
        }
        await self._database.write(lambda connection: connection.execute(training_jobs.insert().values(row)))
        return await self.get(job_id)

    async def get(self, job_id: str) -> TrainingJob:
        """Raises `NotFoundError`."""
        return await self._database.read(lambda connection: _get(connection, job_id))

    async def list(self, state: JobState | None = None) -> Sequence[TrainingJob]:
        """All jobs, or those in one state; newest first."""
        statement = select(*_FIELDS).order_by(training_jobs.c.created_at.desc(), training_jobs.c.id)
        if state is not None:
            statement = statement.where(training_jobs.c.state == state)

        def fetch(connection: Connection) -> list[TrainingJob]:
            return [_job(row) for row in connection.execute(statement).mappings()]

        return await self._database.read(fetch)

    async def claim(self, worker: str) -> TrainingJob | None:
        """Give the oldest waiting or abandoned job to a worker; None when there is none."""
        return await self._database.write(lambda connection: self._claim(connection, worker))

    async def heartbeat(self, job_id: str, worker: str, progress: Mapping[str, Any]) -> TrainingJob:
        """Extend the worker's lease and store its progress. A job in state `cancelled` is returned unchanged.

        Raises:
            NotFoundError: There is no such job.
            ConflictError: The job is another worker's now, or has ended.
        """
        now = self._clock()
        values = {"progress": dict(progress), "heartbeat_at": now, "updated_at": now}

        def work(connection: Connection) -> TrainingJob:
            job = _get(connection, job_id, for_update=True)
            if job.state == "cancelled" and job.worker == worker:
                return job
            _check_owner(job, worker)
            connection.execute(update(training_jobs).where(training_jobs.c.id == job_id).values(values))
            return _get(connection, job_id)

        return await self._database.write(work)

    async def finish(
        self,
        job_id: str,
        worker: str,
        state: Literal["succeeded", "failed"],
        *,
        version: str | None = None,
        evaluation: Mapping[str, Any] | None = None,
        error: str | None = None,
    ) -> TrainingJob:
        """End a job. Reporting the same end again is harmless, and a cancelled job stays cancelled.

        Raises:
            NotFoundError: There is no such job.
            ConflictError: The job is another worker's now, or has ended otherwise.
        """
        values = {
            "state": state,
            "version": version,
            "evaluation": dict(evaluation or {}),
            "error": error,
            "updated_at": self._clock(),
        }

        def work(connection: Connection) -> TrainingJob:
            job = _get(connection, job_id, for_update=True)
            if job.worker == worker and job.state in ("cancelled", state):
                return job
            _check_owner(job, worker)
            connection.execute(update(training_jobs).where(training_jobs.c.id == job_id).values(values))
            return _get(connection, job_id)

        return await self._database.write(work)

    async def cancel(self, job_id: str) -> TrainingJob:
        """Cancel a job; its worker is told with its next heartbeat. Cancelling twice is harmless.

        Raises:
            NotFoundError: There is no such job.
            ConflictError: It has ended.
        """
        values = {"state": "cancelled", "updated_at": self._clock()}

        def work(connection: Connection) -> TrainingJob:
            job = _get(connection, job_id, for_update=True)
            if job.state in ("succeeded", "failed"):
                raise ConflictError(
                    f"the training job {job_id} has {job.state}; only a job that has not ended can be cancelled"
                )
            if job.state != "cancelled":
                connection.execute(update(training_jobs).where(training_jobs.c.id == job_id).values(values))
            return _get(connection, job_id)

        return await self._database.write(work)

    def _claim(self, connection: Connection, worker: str) -> TrainingJob | None:
        table, now = training_jobs, self._clock()
        claimable: ColumnElement[bool] = (table.c.state == "queued") | (
            (table.c.state == "running") & (table.c.heartbeat_at < now - self._lease_s)
        )
        oldest = select(table.c.id).where(claimable).order_by(table.c.created_at, table.c.id).limit(1)
        values = {"state": "running", "worker": worker, "heartbeat_at": now, "updated_at": now}
        # The lock makes workers that claim at once get different jobs; SQLite has one writer at a time anyway.
        job_id = connection.execute(oldest.with_for_update(skip_locked=True)).scalar_one_or_none()
        if job_id is None:
            return None
        connection.execute(update(table).where(table.c.id == job_id).values(values))
        return _get(connection, job_id)


def _get(connection: Connection, job_id: str, *, for_update: bool = False) -> TrainingJob:
    statement = select(*_FIELDS).where(training_jobs.c.id == job_id)
    if for_update:
        statement = statement.with_for_update()
    row = connection.execute(statement).mappings().one_or_none() if _JOB_ID.fullmatch(job_id) else None
    if row is None:
        raise NotFoundError(f"The training job `{job_id}` does not exist", code="job_not_found")
    return _job(row)


def _job(row: RowMapping) -> TrainingJob:
    return TrainingJob(**row)


def _check_owner(job: TrainingJob, worker: str) -> None:
    if job.state != "running":
        raise ConflictError(f"the training job {job.id} is {job.state}, not running")
    if job.worker != worker:
        raise ConflictError(f"the training job {job.id} is now worked on by {job.worker!r}; this worker must stop")
