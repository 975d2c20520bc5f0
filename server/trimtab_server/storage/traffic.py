"""How much a route is used, and how well: what schedules look at in the rollout log."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, Text, exists, func, select, type_coerce

from trimtab_server.storage.database import Database
from trimtab_server.storage.tables import rollout_adapters, rollouts

_USABLE = ("stop", "length")
_SERVED = ("completions", "chat.completions")
IN_THE_MAKING = ".training"
"""End of the names of adapters that training jobs draw with."""

_TABLE = rollouts.c


@dataclass(frozen=True, slots=True)
class RewardWindows:
    """Mean rewards of requests, one value each: the first window since a time, and the newest complete one after it.

    Attributes:
        version: Of the reward; other versions' values are left out.
        number: Which window the newer one is; the older is number 0.
        older: `[window]`.
        newer: `[window]`.
    """

    version: str
    number: int
    older: tuple[float, ...]
    newer: tuple[float, ...]


class SqlTraffic:
    """Reads the rollout log of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def num_usable(self, route: str, since: float) -> int:
        """Rollouts of a route that training can learn from: served to callers, complete and not empty."""
        served = _served(route, since).where(func.length(_TABLE.output_token_ids) > 0).subquery()

        def fetch(connection: Connection) -> int:
            return int(connection.execute(select(func.count()).select_from(served)).scalar_one())

        return await self._database.read(fetch)

    async def reward_windows(self, route: str, since: float, *, reward: str, window: int) -> RewardWindows | None:
        """Requests by the time of their first rollout, cut into windows; None while there are not two of them.

        Args:
            route: Public model name.
            since: Unix seconds.
            reward: Its name; of its versions the newest rollout's counts.
            window: Requests per window.
        """

        def fetch(connection: Connection) -> RewardWindows | None:
            scored = _served(route, since).where(_holds(_field("name", reward)))
            newest = scored.order_by(_TABLE.created_at.desc(), _TABLE.id.desc()).limit(1)
            row = connection.execute(newest).mappings().one_or_none()
            if row is None:
                return None
            version = _value_of(row["rewards"], reward)[1]
            of_version = scored.where(_holds(f"{_field('name', reward)},{_field('version', version)}")).subquery()
            requests = (
                select(of_version.c.request_id, func.min(of_version.c.created_at).label("began_at"))
                .group_by(of_version.c.request_id)
                .subquery()
            )
            num_requests = int(connection.execute(select(func.count()).select_from(requests)).scalar_one())
            number = num_requests // window - 1
            if number < 1:
                return None

            def values(start: int) -> tuple[float, ...]:
                chosen = (
                    select(requests.c.request_id)
                    .order_by(requests.c.began_at, requests.c.request_id)
                    .offset(start)
                    .limit(window)
                    .subquery()
                )
                join = of_version.join(chosen, chosen.c.request_id == of_version.c.request_id)
                rows = connection.execute(select(of_version.c.request_id, of_version.c.rewards).select_from(join))
                by_request: dict[str, list[float]] = {}
                for request_id, logged in rows:
                    by_request.setdefault(request_id, []).append(_value_of(logged, reward)[0])
                return tuple(sum(raw) / len(raw) for raw in by_request.values())

            return RewardWindows(version, number, values(0), values(number * window))

        return await self._database.read(fetch)


def _served(route: str, since: float) -> Select[Any]:
    """Complete rollouts that callers asked for. A training job's own draws are known by the adapter's name."""
    drawn_by_a_job = exists().where(
        rollout_adapters.c.rollout_id == _TABLE.id, rollout_adapters.c.name.endswith(IN_THE_MAKING, autoescape=True)
    )
    columns = (_TABLE.id, _TABLE.created_at, _TABLE.request_id, _TABLE.rewards, _TABLE.output_token_ids)
    return select(*columns).where(
        _TABLE.route == route,
        _TABLE.created_at > since,
        _TABLE.endpoint.in_(_SERVED),
        _TABLE.finish_reason.in_(_USABLE),
        ~drawn_by_a_job,
    )


def _field(name: str, value: str) -> str:
    """As `JsonText` writes it."""
    return f"{json.dumps(name)}:{json.dumps(value)}"


def _holds(part: str) -> ColumnElement[bool]:
    """Whether the rewards, as JSON text, contain a part."""
    return type_coerce(_TABLE.rewards, Text).contains(part, autoescape=True)


def _value_of(logged: Sequence[dict[str, Any]], reward: str) -> tuple[float, str]:
    """Raw value and version."""
    value = next(value for value in _with_parts(logged) if value["name"] == reward)
    return float(value["raw"]), str(value["version"])


def _with_parts(logged: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for value in logged:
        yield value
        yield from _with_parts(value.get("parts") or ())
