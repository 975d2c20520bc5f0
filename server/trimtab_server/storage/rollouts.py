"""Rollouts in the database: written once each, read in the order of time."""

import base64
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, RowMapping, Select, exists, select, tuple_

from trimtab_adapters.contract.calibration import prompt_key
from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_adapters.contract.records import Rollout
from trimtab_adapters.contract.reference_policy import ReferencePolicy
from trimtab_server.storage.base import RolloutFilter
from trimtab_server.storage.database import Database
from trimtab_server.storage.tables import rollout_adapters, rollouts

_BATCH = 500


@dataclass(frozen=True, slots=True)
class RolloutPage:
    """Some rollouts, and where the next ones begin; `cursor` is None on the last page."""

    rollouts: tuple[Rollout, ...]
    cursor: str | None


def insert_rollouts(database: Database, connection: Connection, batch: Sequence[Rollout]) -> None:
    """Write rollouts; those whose id is already there are left as they are."""
    if not batch:
        return
    rows = [{**rollout.model_dump(), **_sample_of(rollout)} for rollout in batch]
    terms = [
        {"rollout_id": rollout.id, "position": position, "name": w.name, "version": w.version, "alpha": w.alpha}
        for rollout in batch
        for position, w in enumerate(rollout.steering)
    ]
    connection.execute(database.insert(rollouts).on_conflict_do_nothing(index_elements=["id"]), rows)
    if terms:
        keys = ["rollout_id", "position"]
        connection.execute(database.insert(rollout_adapters).on_conflict_do_nothing(index_elements=keys), terms)


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
            return [_rollout(row) for row in connection.execute(statement).mappings()]

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
    statement = select(*(column for column in rollouts.columns if column.name in Rollout.model_fields))
    if where.route is not None:
        statement = statement.where(rollouts.c.route == where.route)
    if where.endpoint is not None:
        statement = statement.where(rollouts.c.endpoint == where.endpoint)
    if where.since is not None:
        statement = statement.where(rollouts.c.created_at >= where.since)
    if where.until is not None:
        statement = statement.where(rollouts.c.created_at < where.until)
    if where.chosen_only:
        statement = statement.where(rollouts.c.chosen)
    if where.adapter is not None or where.version is not None:
        term = rollout_adapters.c.rollout_id == rollouts.c.id
        if where.adapter is not None:
            term &= rollout_adapters.c.name == where.adapter
        if where.version is not None:
            term &= rollout_adapters.c.version == where.version
        statement = statement.where(exists().where(term))
    return statement


def _sample_of(rollout: Rollout) -> dict[str, str | None]:
    """By what a sample of a reference policy is found."""
    policy = ReferencePolicy.of_rollout(rollout)
    if policy is None:
        return {"policy": None, "prompt_key": None}
    return {"policy": policy.digest, "prompt_key": prompt_key(rollout.prompt_token_ids)}


def _rollout(row: RowMapping) -> Rollout:
    return Rollout.model_validate(dict(row))
