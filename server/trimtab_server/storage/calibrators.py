"""Per-prompt calibrators in the database."""

import hashlib
import json
import time
from collections.abc import Callable

from sqlalchemy import Connection, select

from trimtab_adapters.contract.calibration import EmpiricalCalibrator
from trimtab_server.storage.database import Database
from trimtab_server.storage.tables import calibrators


class SqlCalibratorStore:
    """A `CalibratorStore` over the database."""

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    async def get(self, prompt_key: str, reward: str, reference: str) -> EmpiricalCalibrator | None:
        """`reward` is `name@version`; `reference` identifies base, steering and sampling settings."""
        statement = select(calibrators.c.scores).where(calibrators.c.key == _key(prompt_key, reward, reference))

        def fetch(connection: Connection) -> list[float] | None:
            return connection.execute(statement).scalar_one_or_none()

        scores = await self._database.read(fetch)
        if scores is None:
            return None
        return EmpiricalCalibrator(scores=tuple(scores), reference=reference, reward=reward)

    async def put(self, prompt_key: str, calibrator: EmpiricalCalibrator) -> None:
        """Replace what was stored for the same prompt, reward and reference."""
        row = {
            "key": _key(prompt_key, calibrator.reward, calibrator.reference),
            "prompt_key": prompt_key,
            "reward": calibrator.reward,
            "reference": calibrator.reference,
            "scores": list(calibrator.scores),
            "updated_at": self._clock(),
        }
        insert = self._database.insert(calibrators).values(row)
        changes = {"scores": insert.excluded.scores, "updated_at": insert.excluded.updated_at}
        statement = insert.on_conflict_do_update(index_elements=["key"], set_=changes)
        await self._database.write(lambda connection: connection.execute(statement))


def _key(prompt_key: str, reward: str, reference: str) -> str:
    return hashlib.sha256(json.dumps([prompt_key, reward, reference]).encode()).hexdigest()
