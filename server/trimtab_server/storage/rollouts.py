"""Rollouts in the database: written once each, read in the order of time."""

import base64
import json
import math
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, FromClause, RowMapping, Select, exists, func, select, tuple_

from trimtab_adapters.contract.calibration import prompt_key
from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_adapters.contract.feedback import Feedback
from trimtab_adapters.contract.records import X_REQUEST_ID, Rollout
from trimtab_adapters.contract.reference_policy import ReferencePolicy
from trimtab_adapters.contract.rollout_filter import RolloutFilter
from trimtab_server.storage.database import Database
from trimtab_server.storage.feedback import feedback_of
from trimtab_server.storage.tables import feedback, rollout_adapters, rollout_rewards, rollouts

_BATCH = 500


@dataclass(frozen=True, slots=True)
class RolloutPage:
    """Some rollouts, and where the next ones begin; `cursor` is None on the last page."""

    rollouts: tuple[Rollout, ...]
    cursor: str | None


def insert_rollouts(database: Database, connection: Connection, batch: Sequence[Rollout]) -> None:
    """Write rollouts; those whose id is already there are left as they are. Their feedback has a table of its own."""
    if not batch:
        return
    rows = [
        {
            **rollout.model_dump(exclude={"feedback"}),
            **_sample_of(rollout),
            "x_request_id": rollout.metadata.get(X_REQUEST_ID),
        }
        for rollout in batch
    ]
    terms = [
        {"rollout_id": rollout.id, "position": position, "name": w.name, "version": w.version, "alpha": w.alpha}
        for rollout in batch
        for position, w in enumerate(rollout.steering)
    ]
    connection.execute(database.insert(rollouts).on_conflict_do_nothing(index_elements=["id"]), rows)
    if terms:
        keys = ["rollout_id", "position"]
        connection.execute(database.insert(rollout_adapters).on_conflict_do_nothing(index_elements=keys), terms)
    scored = [row for rollout in batch for row in _reward_rows(rollout)]
    if scored:
        keys = ["rollout_id", "position"]
        connection.execute(database.insert(rollout_rewards).on_conflict_do_nothing(index_elements=keys), scored)


class SqlRolloutReader:
    """Reads logged rollouts, oldest first, in batches, each in a short transaction of its own.

    Rollouts that reach the database while they are read may be missed; `SpooledRolloutLog.flush` first brings
    everything that was acknowledged.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def read(self, where: RolloutFilter) -> AsyncIterator[Rollout]:
        """All matching rollouts in the order of `created_at`, then `id`.

        Raises:
            StorageError: The database failed.
        """
        after: tuple[float, str] | None = None
        remaining = where.limit
        while remaining is None or remaining > 0:
            size = _BATCH if remaining is None else min(_BATCH, remaining)
            batch = await self._batch(where, after, size)
            for rollout in batch:
                yield rollout
            if len(batch) < size:
                return
            after = (batch[-1].created_at, batch[-1].id)
            remaining = None if remaining is None else remaining - size

    async def page(self, where: RolloutFilter, *, size: int, cursor: str | None = None) -> RolloutPage:
        """At most `size` rollouts behind a page's cursor; `where.limit` is not used.

        Raises:
            InvalidRequestError: The cursor is not one that a page gave.
        """
        batch = await self._batch(where, decode_cursor(cursor) if cursor else None, size + 1)
        page, is_last = batch[:size], len(batch) <= size
        return RolloutPage(tuple(page), None if is_last else encode_cursor(page[-1].created_at, page[-1].id))

    async def _batch(self, where: RolloutFilter, after: tuple[float, str] | None, size: int) -> list[Rollout]:
        statement = _matching(where)
        if after is not None:
            statement = statement.where(tuple_(rollouts.c.created_at, rollouts.c.id) > tuple_(*after))
        statement = statement.order_by(rollouts.c.created_at, rollouts.c.id).limit(size)

        def fetch(connection: Connection) -> list[Rollout]:
            found = [_rollout(row) for row in connection.execute(statement).mappings()]
            return _with_feedback(connection, found)

        return await self._database.read(fetch)


def encode_cursor(created_at: float, rollout_id: str) -> str:
    """An opaque text for a place in the log."""
    return base64.urlsafe_b64encode(json.dumps([created_at, rollout_id]).encode()).decode().rstrip("=")


def decode_cursor(cursor: str) -> tuple[float, str]:
    """Raises `InvalidRequestError` for anything that `encode_cursor` did not make."""
    try:
        created_at, rollout_id = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        if not isinstance(rollout_id, str) or "\x00" in rollout_id:
            raise ValueError("no id")
        return float(created_at), rollout_id
    except (ValueError, TypeError) as exc:
        raise InvalidRequestError(
            "the cursor is not one of this list; leave it out to begin anew", param="cursor"
        ) from exc


def _matching(where: RolloutFilter) -> Select[Any]:
    """`select_rollouts` as a statement."""
    statement = select(*(column for column in rollouts.columns if column.name in Rollout.model_fields))
    statement = statement.where(*_origin(where, rollouts))
    if not where.asks_for_outcome:
        return statement
    if not where.whole_requests:
        return statement.where(*_outcome(where, rollouts))
    others = rollouts.alias("others")
    matching = select(others.c.request_id).where(*_origin(where, others), *_outcome(where, others))
    return statement.where(rollouts.c.request_id.in_(matching))


def _origin(where: RolloutFilter, of: FromClause) -> list[ColumnElement[bool]]:
    columns = of.c
    found: list[ColumnElement[bool]] = []
    for column in (columns.route, columns.base_model, columns.endpoint, columns.request_id):
        if (wanted := getattr(where, column.name)) is not None:
            found.append(column == wanted)
    if where.since is not None:
        found.append(columns.created_at >= where.since)
    if where.until is not None:
        found.append(columns.created_at < where.until)
    if where.chosen_only:
        found.append(columns.chosen)
    term = rollout_adapters.c.rollout_id == columns.id
    if where.adapter is not None or where.version is not None:
        named = term
        if where.adapter is not None:
            named &= rollout_adapters.c.name == where.adapter
        if where.version is not None:
            named &= rollout_adapters.c.version == where.version
        found.append(exists().where(named))
    if where.steered is not None:
        is_steered = exists().where(term & (rollout_adapters.c.alpha != 0.0))
        found.append(is_steered if where.steered else ~is_steered)
    return found


def _outcome(where: RolloutFilter, of: FromClause) -> list[ColumnElement[bool]]:
    found: list[ColumnElement[bool]] = []
    if where.has_feedback is not None:
        has_feedback = exists().where(feedback.c.rollout_id == of.c.id)
        found.append(has_feedback if where.has_feedback else ~has_feedback)
    mean = select(func.avg(feedback.c.rating)).where(feedback.c.rollout_id == of.c.id).scalar_subquery()
    found += _within(mean, where.min_rating, where.max_rating)
    if where.reward is not None:
        scored = [rollout_rewards.c.rollout_id == of.c.id, rollout_rewards.c.name == where.reward]
        scored += _within(rollout_rewards.c.raw, where.min_reward, where.max_reward)
        scored += _within(rollout_rewards.c.calibrated, where.min_calibrated, where.max_calibrated)
        found.append(exists().where(*scored))
    return found


def _within(value: ColumnElement[float], low: float | None, high: float | None) -> list[ColumnElement[bool]]:
    found = [value >= low] if low is not None else []
    return [*found, value <= high] if high is not None else found


def _with_feedback(connection: Connection, batch: Sequence[Rollout]) -> list[Rollout]:
    """The rollouts with what was said of them."""
    statement = (
        select(feedback)
        .where(feedback.c.rollout_id.in_([rollout.id for rollout in batch]))
        .order_by(feedback.c.created_at, feedback.c.rater)
    )
    said: defaultdict[str, list[Feedback]] = defaultdict(list)
    for row in connection.execute(statement).mappings():
        said[row["rollout_id"]].append(feedback_of(row))
    return [r.model_copy(update={"feedback": said[r.id]}) if r.id in said else r for r in batch]


def _sample_of(rollout: Rollout) -> dict[str, str | None]:
    """By what a sample of a reference policy is found."""
    policy = ReferencePolicy.of_rollout(rollout)
    if policy is None:
        return {"policy": None, "prompt_key": None}
    return {"policy": policy.digest, "prompt_key": prompt_key(rollout.prompt_token_ids)}


def _reward_rows(rollout: Rollout) -> list[dict[str, Any]]:
    """By what rollouts are found by their rewards."""
    return [
        {
            "rollout_id": rollout.id,
            "position": position,
            "name": value.name,
            "raw": None if math.isnan(value.raw) else value.raw,
            "calibrated": value.calibrated,
        }
        for position, value in enumerate(rollout.rewards)
    ]


def _rollout(row: RowMapping) -> Rollout:
    return Rollout.model_validate(dict(row))
