"""Registered rewards in the database."""

import time
from collections.abc import Callable, Sequence

from sqlalchemy import Connection, delete, select

from trimtab_adapters.contract.errors import ConflictError
from trimtab_adapters.contract.rewards import RewardSpec
from trimtab_server.storage.database import Database
from trimtab_server.storage.tables import rewards, route_revisions, routes


class SqlRewardSpecs:
    """`RewardSpecs` over the database."""

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    async def list(self) -> Sequence[RewardSpec]:
        """All of them, by name."""

        def fetch(connection: Connection) -> list[RewardSpec]:
            columns = (rewards.c.name, rewards.c.kind, rewards.c.target, rewards.c.options)
            rows = connection.execute(select(*columns).order_by(rewards.c.name)).mappings()
            return [RewardSpec.model_validate(dict(row)) for row in rows]

        return await self._database.read(fetch)

    async def put(self, spec: RewardSpec) -> None:
        """Add or replace by name."""
        row = {**spec.model_dump(), "updated_at": self._clock()}
        insert = self._database.insert(rewards).values(row)
        changes = {name: insert.excluded[name] for name in row if name != "name"}
        statement = insert.on_conflict_do_update(index_elements=["name"], set_=changes)
        await self._database.write(lambda connection: connection.execute(statement))

    async def delete(self, name: str) -> bool:
        """Whether there was one of that name.

        Raises:
            ConflictError: A route names it.
        """

        def work(connection: Connection) -> bool:
            at_revision = (route_revisions.c.route == routes.c.name) & (route_revisions.c.revision == routes.c.revision)
            using = select(routes.c.name).join(route_revisions, at_revision).where(route_revisions.c.reward == name)
            if users := connection.execute(using.order_by(routes.c.name)).scalars().all():
                raise ConflictError(f"the reward {name!r} is in use by the routes {', '.join(users)}", param="name")
            return connection.execute(delete(rewards).where(rewards.c.name == name)).rowcount > 0

        return await self._database.write(work)
