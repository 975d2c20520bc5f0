"""The queue of training jobs: each is worked on by one worker at a time.

queued ──claim──> running ──finish──> succeeded | failed
   │  <──release──     │
   └────cancel────────┴──> cancelled
running ──claim, when its heartbeat is older than the lease──> running, by another worker
running ──claim, when its workers were lost again and again without getting further──> failed
"""

import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, RowMapping, select, update

from trimtab_adapters.contract.errors import ConflictError, NotFoundError
from trimtab_server.storage.base import JobLine, JobState, TrainingJob
from trimtab_server.storage.database import Database
from trimtab_server.storage.job_lines import MAX_LINES, Kind, read_lines, store_lines
from trimtab_server.storage.tables import training_jobs

LEASE_S = 120.0
"""A worker that was not heard of for this long is taken for dead."""
MAX_LOST = 5
"""Workers that a job may lose in a row before it has got further: what kills each of them, such as a lack of memory,
would kill the next one too, and nobody would see that it never ends."""
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
        "attempt",
    )
)


class TrainingJobs:
    """Training jobs in the database.

    Args:
        database: Migrated.
        lease_s: How old a heartbeat may be before another worker may claim the job, in seconds.
        num_lines: Newest lines of log and of metrics that are kept of each job.
        max_lost: See `MAX_LOST`.
        clock: Unix seconds.
    """

    def __init__(
        self,
        database: Database,
        *,
        lease_s: float = LEASE_S,
        num_lines: int = MAX_LINES,
        max_lost: int = MAX_LOST,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self.lease_s = lease_s
        self._num_lines = num_lines
        self._max_lost = max_lost
        self._clock = clock

    async def submit(self, config: Mapping[str, Any], *, name: str = "") -> TrainingJob:
        """Queue a job."""

        def work(connection: Connection) -> TrainingJob:
            return _get(connection, insert_job(connection, config, name=name, now=self._clock()))

        return await self._database.write(work)

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

    async def heartbeat(
        self,
        job_id: str,
        worker: str,
        progress: Mapping[str, Any],
        *,
        attempt: int | None = None,
        log: Sequence[JobLine] = (),
        metrics: Sequence[JobLine] = (),
    ) -> TrainingJob:
        """Extend the worker's lease and store its progress and the new lines of its log and metrics.

        A job in state `cancelled` stays so and is returned, with the lines added. `attempt` None is any of the worker.

        Raises:
            NotFoundError: There is no such job.
            ConflictError: The job is another worker's now, or has ended.
        """
        now = self._clock()
        values = {"progress": dict(progress), "heartbeat_at": now, "updated_at": now}

        def work(connection: Connection) -> TrainingJob:
            job = _get(connection, job_id, for_update=True)
            if job.state != "cancelled" or not _is_owner(job, worker, attempt):
                _check_owner(job, worker, attempt)
                connection.execute(update(training_jobs).where(training_jobs.c.id == job_id).values(values))
            kinds: dict[Kind, Sequence[JobLine]] = {"log": log, "metrics": metrics}
            for kind, lines in kinds.items():
                store_lines(self._database, connection, job_id, kind, lines, keep=self._num_lines)
            return _get(connection, job_id)

        return await self._database.write(work)

    async def lines(self, job_id: str, kind: Kind, *, tail: int) -> Sequence[JobLine]:
        """The newest lines of a job's log or metrics, oldest first. Raises `NotFoundError`."""

        def fetch(connection: Connection) -> list[JobLine]:
            return read_lines(connection, _get(connection, job_id).id, kind, tail=tail)

        return await self._database.read(fetch)

    async def release(self, job_id: str, worker: str, *, attempt: int | None = None) -> TrainingJob:
        """Put a job back into the queue, for another worker to go on with at once.

        Raises:
            NotFoundError: There is no such job.
            ConflictError: The job is another worker's now, or has ended.
        """
        values = {"state": "queued", "updated_at": self._clock()}

        def work(connection: Connection) -> TrainingJob:
            job = _get(connection, job_id, for_update=True)
            if job.state == "queued" and _is_owner(job, worker, attempt):  # asked again
                return job
            _check_owner(job, worker, attempt)
            connection.execute(update(training_jobs).where(training_jobs.c.id == job_id).values(values))
            return _get(connection, job_id)

        return await self._database.write(work)

    async def finish(
        self,
        job_id: str,
        worker: str,
        state: Literal["succeeded", "failed"],
        *,
        attempt: int | None = None,
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
            if _is_owner(job, worker, attempt) and job.state in ("cancelled", state):
                return job
            _check_owner(job, worker, attempt)
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
            (table.c.state == "running") & (table.c.heartbeat_at < now - self.lease_s)
        )
        fields = (table.c.id, table.c.state, table.c.progress, table.c.num_lost, table.c.lost_at_step)
        oldest = select(*fields).where(claimable).order_by(table.c.created_at, table.c.id).limit(1)
        values = {
            "state": "running",
            "worker": worker,
            "heartbeat_at": now,
            "updated_at": now,
            "attempt": table.c.attempt + 1,
        }
        while True:
            # The lock makes workers that claim at once get different jobs; SQLite has one writer at a time anyway.
            row = connection.execute(oldest.with_for_update(skip_locked=True)).mappings().one_or_none()
            if row is None:
                return None
            lost = _lost(row) if row["state"] == "running" else {}
            is_hopeless = lost.get("num_lost", 0) > self._max_lost
            found = {**lost, **(_given_up(lost, now) if is_hopeless else values)}
            connection.execute(update(table).where(table.c.id == row["id"]).values(found))
            if not is_hopeless:
                return _get(connection, row["id"])


def _lost(row: RowMapping) -> dict[str, Any]:
    """What is known of a job whose worker was lost: how many were, since it last got further."""
    step, before = row["progress"].get("step") or 0.0, row["lost_at_step"]
    has_got_further = before is None or step > before
    return {
        "num_lost": 1 if has_got_further else row["num_lost"] + 1,
        "lost_at_step": step if has_got_further else before,
    }


def _given_up(lost: Mapping[str, Any], now: float) -> dict[str, Any]:
    error = (
        f"{lost['num_lost']} workers in a row were lost with this job at step {lost['lost_at_step']:g} or before it: "
        "they were killed, or ran out of memory; see the last lines of its log, and limits.memory_gib"
    )
    return {"state": "failed", "error": error, "updated_at": now}


def insert_job(connection: Connection, config: Mapping[str, Any], *, name: str, now: float) -> str:
    """Queue a job in a transaction of the caller's; returns its id."""
    job_id = f"job-{uuid.uuid4().hex}"
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
    connection.execute(training_jobs.insert().values(row))
    return job_id


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


def _is_owner(job: TrainingJob, worker: str, attempt: int | None) -> bool:
    return job.worker == worker and attempt in (None, job.attempt)


def _check_owner(job: TrainingJob, worker: str, attempt: int | None) -> None:
    if job.state != "running":
        raise ConflictError(f"the training job {job.id} is {job.state}, not running")
    if not _is_owner(job, worker, attempt):
        raise ConflictError(
            f"the training job {job.id} is now worked on by {job.worker!r} in attempt {job.attempt}; this one must stop"
        )
