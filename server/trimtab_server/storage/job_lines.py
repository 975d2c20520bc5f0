"""The newest lines of each training job's log and metrics; all of them are in the job's own directory.

A worker sends them with its heartbeats, numbered from 1 in each attempt, so that what is sent again changes nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sqlalchemy import Connection, delete, select, tuple_

from trimtab_server.storage.base import JobLine
from trimtab_server.storage.database import Database
from trimtab_server.storage.tables import training_job_lines

Kind = Literal["log", "metrics"]

MAX_LINES = 2000
"""Newest lines of each kind that are kept of a job."""

_TABLE = training_job_lines.c


def store_lines(
    database: Database, connection: Connection, job_id: str, kind: Kind, lines: Sequence[JobLine], *, keep: int
) -> None:
    """Add lines of one attempt and delete all but the newest `keep`.

    Metrics of an earlier attempt that lie behind the first of these are deleted: the run goes on from a checkpoint
    before them and reports these steps again.
    """
    if not lines:
        return
    mine = (_TABLE.job_id == job_id) & (_TABLE.kind == kind)
    steps = [line.step for line in lines if line.step is not None]
    if steps:
        repeated = (_TABLE.attempt < lines[0].attempt) & (_TABLE.step > min(steps))
        connection.execute(delete(training_job_lines).where(mine, repeated))
    rows: list[Mapping[str, Any]] = [
        {"job_id": job_id, "kind": kind, "attempt": i.attempt, "number": i.number, "step": i.step, "content": i.content}
        for i in lines
    ]
    insert = database.insert(training_job_lines)
    connection.execute(insert.on_conflict_do_nothing(index_elements=["job_id", "kind", "attempt", "number"]), rows)
    order = (_TABLE.attempt.desc(), _TABLE.number.desc())
    oldest = select(_TABLE.attempt, _TABLE.number).where(mine).order_by(*order).offset(keep).limit(1)
    if (last := connection.execute(oldest).one_or_none()) is not None:
        too_old = tuple_(_TABLE.attempt, _TABLE.number) <= tuple_(*last)
        connection.execute(delete(training_job_lines).where(mine, too_old))


def read_lines(connection: Connection, job_id: str, kind: Kind, *, tail: int) -> list[JobLine]:
    """The newest `tail` lines, oldest first."""
    statement = (
        select(_TABLE.attempt, _TABLE.number, _TABLE.content, _TABLE.step)
        .where(_TABLE.job_id == job_id, _TABLE.kind == kind)
        .order_by(_TABLE.attempt.desc(), _TABLE.number.desc())
        .limit(tail)
    )
    return [JobLine(**row) for row in connection.execute(statement).mappings()][::-1]
