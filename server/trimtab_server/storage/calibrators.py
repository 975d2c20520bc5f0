"""Calibrators in the database: scores of reference rollouts per prompt, and those for prompts never seen."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, RowMapping, delete, func, select

from trimtab_adapters.contract.calibration import ReferenceScores
from trimtab_adapters.contract.errors import StorageError
from trimtab_adapters.contract.pooled_calibration import PooledCalibrator
from trimtab_server.storage.base import StoredPooledCalibrator
from trimtab_server.storage.database import Database
from trimtab_server.storage.tables import calibrators, pooled_calibrators

_MAX_READ = 64
"""Pooled calibrators that are held in memory."""


@dataclass(frozen=True, slots=True)
class CalibratorGroup:
    """The per-prompt calibrators of one reward, or mix, and one reference policy.

    Attributes:
        id: Of the group; the same for the same reward and policy.
        reward: `name@version`, of a mix one line each.
        reference: The reference policy's key.
        num_prompts: How many prompts have one.
        num_rollouts: How many rollouts they rest on, all together.
        updated_at: Unix time in seconds of the last change.
    """

    id: str
    reward: str
    reference: str
    num_prompts: int
    num_rollouts: int
    updated_at: float


class SqlCalibratorStore:
    """A `CalibratorStore` over the database."""

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    async def get(self, prompt_key: str, reward: str, reference: str) -> ReferenceScores | None:
        """`reward` is `name@version`, of a mix all of them; `reference` is the reference policy's key."""
        wanted = calibrators.c.key == _hash(prompt_key, reward, reference)
        statement = select(calibrators.c.scores, calibrators.c.num_parts).where(wanted)

        def fetch(connection: Connection) -> RowMapping | None:
            return connection.execute(statement).mappings().one_or_none()

        row = await self._database.read(fetch)
        if row is None:
            return None
        numbers, width = row["scores"], row["num_parts"]
        rows = tuple(tuple(numbers[i : i + width]) for i in range(0, len(numbers), width))
        return ReferenceScores(rows, reference, reward)

    async def put(self, prompt_key: str, calibrator: ReferenceScores) -> None:
        """Replace what was stored for the same prompt, reward and reference."""
        row = {
            "key": _hash(prompt_key, calibrator.reward, calibrator.reference),
            "prompt_key": prompt_key,
            "reward": calibrator.reward,
            "reference": calibrator.reference,
            "scores": [score for scores in calibrator.rows for score in scores],
            "num_parts": len(calibrator.rows[0]),
            "num_rollouts": calibrator.size,
            "updated_at": self._clock(),
        }
        insert = self._database.insert(calibrators).values(row)
        changes = {name: insert.excluded[name] for name in ("scores", "num_parts", "num_rollouts", "updated_at")}
        statement = insert.on_conflict_do_update(index_elements=["key"], set_=changes)
        await self._database.write(lambda connection: connection.execute(statement))

    async def groups(self) -> list[CalibratorGroup]:
        """All per-prompt calibrators, by reward and reference policy."""
        columns = calibrators.c
        statement = (
            select(
                columns.reward,
                columns.reference,
                func.count().label("num_prompts"),
                func.sum(columns.num_rollouts).label("num_rollouts"),
                func.max(columns.updated_at).label("updated_at"),
            )
            .group_by(columns.reward, columns.reference)
            .order_by(columns.reward, columns.reference)
        )

        def fetch(connection: Connection) -> list[CalibratorGroup]:
            return [
                CalibratorGroup(id=f"ref-{_hash(row['reward'], row['reference'])[:16]}", **row)
                for row in connection.execute(statement).mappings()
            ]

        return await self._database.read(fetch)

    async def delete_group(self, group: CalibratorGroup) -> None:
        """Forget the calibrators of a group."""
        columns = calibrators.c
        statement = delete(calibrators).where(columns.reward == group.reward, columns.reference == group.reference)
        await self._database.write(lambda connection: connection.execute(statement))


class SqlPooledCalibratorStore:
    """A `PooledCalibratorStore` over the database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._read: dict[str, StoredPooledCalibrator] = {}

    async def get(self, calibrator_id: str) -> StoredPooledCalibrator | None:
        """By id."""
        found = await self._select(pooled_calibrators.c.id == calibrator_id)
        return found[0] if found else None

    async def of_reward(self, reward_name: str) -> Sequence[StoredPooledCalibrator]:
        """All of a reward, whatever its version, newest first."""
        return await self._select(pooled_calibrators.c.reward_name == reward_name)

    async def everything(self) -> Sequence[StoredPooledCalibrator]:
        """All of them, newest first."""
        return await self._select()

    async def add(self, stored: StoredPooledCalibrator) -> None:
        """Keep a new one."""
        row = {
            "id": stored.id,
            "reward_name": stored.reward_name,
            "calibrator": stored.calibrator.to_json(),
            "report": stored.report,
            "created_at": stored.created_at,
        }
        await self._database.write(lambda connection: connection.execute(pooled_calibrators.insert().values(row)))

    async def delete(self, calibrator_id: str) -> None:
        """Forget one; nothing happens when it is not there."""
        statement = delete(pooled_calibrators).where(pooled_calibrators.c.id == calibrator_id)
        await self._database.write(lambda connection: connection.execute(statement))

    async def _select(self, *where: Any) -> list[StoredPooledCalibrator]:
        columns = pooled_calibrators.c
        listed = select(columns.id).where(*where).order_by(columns.created_at.desc(), columns.id.desc())

        def fetch(connection: Connection) -> tuple[list[str], list[StoredPooledCalibrator]]:
            ids = list(connection.execute(listed).scalars())
            # They never change, and reading one takes milliseconds.
            unknown = [calibrator_id for calibrator_id in ids if calibrator_id not in self._read]
            if not unknown:
                return ids, []
            rows = connection.execute(select(pooled_calibrators).where(columns.id.in_(unknown))).mappings()
            return ids, [_stored(row) for row in rows]

        ids, read = await self._database.read(fetch)
        found = self._read | {stored.id: stored for stored in read}
        self._read = dict(list(found.items())[-_MAX_READ:])
        return [found[calibrator_id] for calibrator_id in ids]


def _stored(row: RowMapping) -> StoredPooledCalibrator:
    try:
        calibrator = PooledCalibrator.from_json(row["calibrator"])
    except (ValueError, KeyError) as exc:
        raise StorageError(f"the pooled calibrator {row['id']} cannot be read: {exc}") from exc
    return StoredPooledCalibrator(row["id"], calibrator, row["report"], row["created_at"])


def _hash(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
