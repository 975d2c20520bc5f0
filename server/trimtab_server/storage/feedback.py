"""Feedback in the database: at most one row for each person and choice, written before the answer."""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from sqlalchemy import Connection, RowMapping, select

from trimtab_adapters.contract.errors import InvalidRequestError, NotFoundError
from trimtab_adapters.contract.feedback import Feedback
from trimtab_server.storage.database import Database
from trimtab_server.storage.tables import feedback, rollouts


@dataclass(frozen=True, slots=True)
class ChoiceName:
    """Which choice is meant: by the answer's id, or by the id that the caller gave the request; one of the two.

    Attributes:
        index: Among the choices of the answer.
        completion_id: The answer's `id`.
        request_id: The request's `x-request-id`.
    """

    index: int
    completion_id: str | None = None
    request_id: str | None = None


@dataclass(frozen=True, slots=True)
class StoredFeedback:
    """Feedback with what it is about."""

    completion_id: str
    rollout_id: str
    index: int
    feedback: Feedback


class SqlFeedback:
    """Takes feedback on logged choices.

    Args:
        database: Migrated.
        flush: Brings every acknowledged rollout to the database: feedback may be quicker than the log.
        clock: Unix time in seconds.
    """

    def __init__(
        self, database: Database, flush: Callable[[], Awaitable[None]], *, clock: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self._flush = flush
        self._clock = clock

    async def put(
        self,
        choice: ChoiceName,
        *,
        user: str | None = None,
        rating: float | None = None,
        comment: str | None = None,
        preferred_index: int | None = None,
    ) -> StoredFeedback:
        """Keep what somebody says of a choice, in the place of what the same one said before. Durable on return.

        Raises:
            NotFoundError: No such choice is in the log.
            InvalidRequestError: The request id is that of several answers, or the preferred choice is not one of the
                same prompt.
            StorageError: It is not kept.
        """
        values = {"rating": rating, "comment": comment, "preferred_index": preferred_index}

        def work(connection: Connection) -> StoredFeedback | None:
            row = _find(connection, choice)
            if row is None:
                return None
            if preferred_index is not None:
                _check_preferred(connection, row, preferred_index)
            said = _put(self._database, connection, row["id"], user or "", {**values, "updated_at": self._clock()})
            return StoredFeedback(row["request_id"], row["id"], choice.index, said)

        stored = await self._database.write(work)
        if stored is None:
            await self._flush()
            stored = await self._database.write(work)
        if stored is None:
            raise _unknown(choice)
        return stored


def feedback_of(row: RowMapping) -> Feedback:
    """A row of the table."""
    names = ("rating", "comment", "preferred_index", "created_at", "updated_at")
    return Feedback(user=row["rater"] or None, **{name: row[name] for name in names})


def _find(connection: Connection, choice: ChoiceName) -> RowMapping | None:
    columns = rollouts.c
    statement = select(columns.id, columns.request_id, columns.metadata).where(columns.choice_index == choice.index)
    if choice.completion_id is not None:
        statement = statement.where(columns.request_id == choice.completion_id)
    else:
        statement = statement.where(columns.x_request_id == choice.request_id)
    rows = connection.execute(statement.limit(2)).mappings().all()
    if len(rows) > 1:
        raise InvalidRequestError(
            f"Several answers carry the request id {choice.request_id!r}; name the one that is meant by "
            "'completion_id', the answer's own id.",
            param="request_id",
            code="ambiguous_request_id",
        )
    return rows[0] if rows else None


def _check_preferred(connection: Connection, row: RowMapping, preferred_index: int) -> None:
    columns = rollouts.c
    statement = select(columns.metadata).where(
        columns.request_id == row["request_id"], columns.choice_index == preferred_index
    )
    found = connection.execute(statement).mappings().first()
    if found is None or found["metadata"].get("prompt_index") != row["metadata"].get("prompt_index"):
        raise InvalidRequestError(
            f"Invalid 'preferred_index': {preferred_index} is no choice of the same prompt.", param="preferred_index"
        )


def _put(
    database: Database, connection: Connection, rollout_id: str, rater: str, values: dict[str, float | str | int | None]
) -> Feedback:
    insert = database.insert(feedback).values(
        rollout_id=rollout_id, rater=rater, created_at=values["updated_at"], **values
    )
    connection.execute(insert.on_conflict_do_update(index_elements=["rollout_id", "rater"], set_=values))
    mine = (feedback.c.rollout_id == rollout_id) & (feedback.c.rater == rater)
    return feedback_of(connection.execute(select(feedback).where(mine)).mappings().one())


def _unknown(choice: ChoiceName) -> NotFoundError:
    by_answer = choice.completion_id is not None
    what = f"answer {choice.completion_id!r}" if by_answer else f"request {choice.request_id!r}"
    return NotFoundError(
        f"There is no choice {choice.index} of the {what} in the rollout log, so nothing can be said of it. All "
        "answers are logged unless the gateway runs with rollouts off.",
        param="completion_id" if by_answer else "request_id",
        code="completion_not_found",
    )
