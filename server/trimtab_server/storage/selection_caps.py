"""Measured caps for best-of-N in the database."""

import hashlib
import json
from collections.abc import Sequence

from sqlalchemy import Connection, select

from trimtab_adapters.contract.selection_cap import SelectionCap
from trimtab_server.storage.database import Database
from trimtab_server.storage.tables import selection_caps


class SqlSelectionCaps:
    """A `SelectionCapStore` over the database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def list(self) -> Sequence[SelectionCap]:
        """All of them, newest first."""
        statement = select(selection_caps.c.cap).order_by(selection_caps.c.created_at.desc(), selection_caps.c.key)

        def fetch(connection: Connection) -> list[SelectionCap]:
            return [SelectionCap.model_validate(cap) for cap in connection.execute(statement).scalars()]

        return await self._database.read(fetch)

    async def put(self, cap: SelectionCap) -> None:
        """Replace what was stored for the same rewards and base model."""
        names = [cap.proxy, cap.gold, cap.base_model]
        row = {
            "key": hashlib.sha256(json.dumps(names).encode()).hexdigest(),
            "proxy": cap.proxy,
            "gold": cap.gold,
            "base_model": cap.base_model,
            "cap": cap.model_dump(),
            "created_at": cap.created_at,
        }
        insert = self._database.insert(selection_caps).values(row)
        changes = {name: insert.excluded[name] for name in ("cap", "created_at")}
        statement = insert.on_conflict_do_update(index_elements=["key"], set_=changes)
        await self._database.write(lambda connection: connection.execute(statement))
