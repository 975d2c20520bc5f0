"""An admin API over a real catalog, store, log and queue, with a scripted engine."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from trimtab_adapters.contract.errors import InvalidRequestError, NotFoundError, TrimtabError
from trimtab_adapters.contract.params import VersionId
from trimtab_adapters.contract.rewards import RewardChoice, RewardInput, RewardSpec
from trimtab_adapters.store import VersionStore
from trimtab_server.api.admin.router import AdminParts, build_admin_router
from trimtab_server.auth import Auth
from trimtab_server.engine.adapter_memory import VersionResidency
from trimtab_server.engine.fake import FakeEngine
from trimtab_server.errors import install_error_handlers
from trimtab_server.overoptimization.cap_survey import CapSurvey
from trimtab_server.overoptimization.selection_caps import SelectionCaps
from trimtab_server.rewards.attempts import Scored
from trimtab_server.rewards.registry import RewardReport
from trimtab_server.schedules.scheduler import Scheduler
from trimtab_server.settings import Settings
from trimtab_server.storage.base import AdapterVersion
from trimtab_server.storage.catalog import SqlCatalog
from trimtab_server.storage.database import Database
from trimtab_server.storage.jobs import TrainingJobs
from trimtab_server.storage.rollout_log import SpooledRolloutLog
from trimtab_server.storage.rollouts import SqlRolloutReader
from trimtab_server.storage.selection_caps import SqlSelectionCaps
from trimtab_server.storage.traffic import SqlTraffic
from trimtab_server.storage.training_schedules import TrainingSchedules

ADMIN_KEY = "admin-secret"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class ScriptedEngine:
    """The hooks' view of an engine: what was asked of it, and failures on demand."""

    calls: list[tuple[str, str]] = field(default_factory=list)
    error: TrimtabError | None = None
    vocabulary: tuple[str, int] | None = None

    async def validate(self, version: AdapterVersion) -> None:
        self._note("validate", version.version)

    async def load(self, version: VersionId) -> None:
        self._note("load", version)

    async def free(self, version: VersionId) -> None:
        self._note("free", version)

    async def base_vocabulary(self) -> tuple[str, int] | None:
        return self.vocabulary

    def _note(self, call: str, version: str) -> None:
        self.calls.append((call, version))
        if self.error is not None:
            raise self.error


class LengthReward:
    """The length of the output; also the queue in front of itself."""

    name = "length"
    version = "7"

    def __init__(self) -> None:
        self.batches: list[int] = []

    async def scored(self, inputs: Sequence[RewardInput]) -> Scored:
        return Scored(self.version, await self.score(inputs))

    async def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        self.batches.append(len(inputs))
        return [float(len(item.output)) for item in inputs]


class BrevityReward:
    """1 for outputs of four letters, less for any other."""

    name = "brevity"
    version = "2"

    async def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        return [1.0 - abs(len(item.output) - 4) / 4 for item in inputs]

    async def scored(self, inputs: Sequence[RewardInput]) -> Scored:
        return Scored(self.version, await self.score(inputs))


class OneReward:
    """A registry with `length` in it, and `brevity` installed."""

    def __init__(self) -> None:
        self.reward = LengthReward()
        self.specs = [RewardSpec(name="length", kind="callable", target="length")]

    async def batched(self, name: str) -> LengthReward | BrevityReward:
        if name == "brevity":
            return BrevityReward()
        if name != "length":
            raise NotFoundError(f"the reward {name!r} does not exist", param="reward", code="reward_not_found")
        return self.reward

    async def resolve(self, choice: RewardChoice) -> object:
        return await self.batched(str(choice))

    async def list(self) -> Sequence[RewardSpec]:
        return self.specs

    async def report(self, name: str) -> RewardReport:
        raise AssertionError("not scripted")

    async def add(self, spec: RewardSpec) -> str:
        if spec.target == "nowhere":
            raise InvalidRequestError("there is no entry point 'nowhere'", param="target")
        self.specs.append(spec)
        return self.reward.version

    async def remove(self, name: str) -> None:
        raise AssertionError("not scripted")


@dataclass
class AdminBench:
    """The API's client and handles on its parts."""

    app: FastAPI
    client: httpx.AsyncClient
    catalog: SqlCatalog
    log: SpooledRolloutLog
    engine: ScriptedEngine
    fake_engine: FakeEngine
    rewards: OneReward
    directory: Path
    scheduler: Scheduler

    async def call(self, method: str, path: str, expected: int = 200, **kwargs: Any) -> Any:
        response = await self.client.request(method, f"/admin/{path}", **kwargs)
        assert response.status_code == expected, response.text
        return response.json() if response.content else None

    async def refused(self, method: str, path: str, status: int, **kwargs: Any) -> dict[str, Any]:
        """The error object of a refusal, which always has OpenAI's four fields."""
        body = await self.call(method, path, status, **kwargs)
        assert set(body["error"]) == {"message", "type", "param", "code"}
        return dict(body["error"])


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[AdminBench]:
    database = Database(f"sqlite:///{tmp_path / 'trimtab.db'}")
    database.migrate()
    catalog = SqlCatalog(database, VersionStore(tmp_path / "store"), "base")
    await catalog.load()
    log = SpooledRolloutLog(database, tmp_path / "spool", linger_s=60.0)
    await log.start()
    engine, fake_engine, rewards = ScriptedEngine(), FakeEngine(), OneReward()
    (tmp_path / "adapters").mkdir()
    reader = SqlRolloutReader(database)
    schedules = TrainingSchedules(database)
    parts = AdminParts(
        catalog=catalog,
        reader=reader,
        flush=log.flush,
        jobs=TrainingJobs(database),
        schedules=schedules,
        rewards=rewards,
        cap_survey=CapSurvey(reader, log.flush, rewards, SelectionCaps(SqlSelectionCaps(database)), "base"),
        engines=[fake_engine],
        validate=engine.validate,
        before_switch=engine.load,
        after_retire=engine.free,
        residency_of=lambda version: VersionResidency(),
        base_vocabulary=engine.base_vocabulary,
        adapter_roots=[tmp_path / "adapters"],
    )
    scheduler = Scheduler(schedules, SqlTraffic(database))
    app = FastAPI()
    app.state.auth = Auth(Settings(model="base", admin_keys=(ADMIN_KEY,)))
    install_error_handlers(app)
    app.include_router(build_admin_router(parts))
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers) as client:
        yield AdminBench(app, client, catalog, log, engine, fake_engine, rewards, tmp_path / "adapters", scheduler)
    await log.aclose()
    database.close()
