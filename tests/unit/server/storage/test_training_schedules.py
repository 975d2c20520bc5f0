"""Schedules over a real log and queue: when they post a job, and that they never post two."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from trimtab_adapters.contract.errors import ConflictError, NotFoundError, StorageError
from trimtab_adapters.contract.params import AdapterWeight
from trimtab_adapters.contract.records import RewardValue, Rollout
from trimtab_server.schedules.scheduler import Scheduler
from trimtab_server.schedules.triggers import Drift, Every, Triggers
from trimtab_server.storage.database import Database
from trimtab_server.storage.jobs import TrainingJobs
from trimtab_server.storage.rollouts import insert_rollouts
from trimtab_server.storage.traffic import SqlTraffic
from trimtab_server.storage.training_schedules import TrainingSchedules

pytestmark = pytest.mark.anyio

MakeRollout = Callable[..., Rollout]
CONFIG = {"steps": 3}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class World:
    """One database with everything that schedules touch, at a time that stands still."""

    def __init__(self, database: Database, make_rollout: MakeRollout) -> None:
        self.clock = Clock()
        self.database = database
        self.schedules = TrainingSchedules(database, clock=self.clock)
        self.jobs = TrainingJobs(database, clock=self.clock)
        self.scheduler = self.build_scheduler()
        self._make = make_rollout
        self._num = 0

    def build_scheduler(self) -> Scheduler:
        return Scheduler(self.schedules, SqlTraffic(self.database), clock=self.clock)

    async def add(self, every: Every | None = None, drift: Drift | None = None, name: str = "s") -> None:
        triggers = Triggers(route="kind", every=every, drift=drift)
        await self.schedules.add(name, CONFIG, triggers.model_dump(mode="json"))

    async def serve(self, num: int = 1, **changes: Any) -> None:
        """Log rollouts, each of a request of its own and a second after the other."""
        batch = []
        for _ in range(num):
            self._num += 1
            self.clock.now += 1.0
            fields = {"request_id": f"q{self._num}", "created_at": self.clock.now, "rewards": [], **changes}
            batch.append(self._make(f"r{self._num}", **fields))
        await self.database.write(lambda connection: insert_rollouts(self.database, connection, batch))

    async def serve_rewards(self, rewards: list[float], version: str = "1") -> None:
        for raw in rewards:
            await self.serve(rewards=[RewardValue(name="kindness", version=version, raw=raw)])

    async def end(self, job_id: str, state: str = "succeeded") -> None:
        self.clock.now += 1.0
        claimed = await self.jobs.claim("w")
        assert claimed is not None
        assert claimed.id == job_id
        await self.jobs.finish(job_id, "w", state)  # type: ignore[arg-type]


@pytest.fixture
def world(database: Database, make_rollout: MakeRollout) -> World:
    return World(database, make_rollout)


async def test_new_rollouts_are_counted_from_the_schedules_beginning_and_from_each_jobs_end(world: World) -> None:
    await world.serve(5)
    await world.add(Every(new_rollouts=3))
    await world.serve(2)
    assert await world.scheduler.look() == []
    await world.serve(1)
    (job,) = await world.scheduler.look()
    await world.serve(9)
    assert await world.scheduler.look() == []  # its job waits
    await world.end(job)
    assert await world.scheduler.look() == []  # what came while it ran does not count
    await world.serve(3)
    (again,) = await world.scheduler.look()
    schedule = await world.schedules.get("s")
    assert [run.job_id for run in schedule.runs] == [again, job]
    assert [run.state for run in schedule.runs] == ["queued", "succeeded"]
    assert schedule.runs[1].reason == {"new_rollouts": {"is_due": True, "num": 3}}
    assert (await world.jobs.get(job)).config == CONFIG


async def test_only_complete_rollouts_that_callers_asked_for_count(world: World) -> None:
    await world.add(Every(new_rollouts=1))
    not_counted: list[dict[str, Any]] = [
        {"route": "other"},
        {"finish_reason": "abort"},
        {"finish_reason": None},
        {"output_token_ids": []},
        {"endpoint": "reference"},
        {"endpoint": "training"},
        {"steering": [AdapterWeight(name="kind.training", version="a" * 16, alpha=1.0)]},
    ]
    for changes in not_counted:
        await world.serve(**changes)
        assert await world.scheduler.look() == [], changes
    await world.serve(finish_reason="length", endpoint="chat.completions")
    assert len(await world.scheduler.look()) == 1


async def test_hours_are_counted_from_posting_to_posting(world: World) -> None:
    await world.add(Every(hours=2.0))
    world.clock.now += 7199.0
    assert await world.scheduler.look() == []
    world.clock.now += 1.0
    (job,) = await world.scheduler.look()
    world.clock.now += 7000.0
    await world.end(job)
    world.clock.now += 198.0
    assert await world.scheduler.look() == []
    world.clock.now += 1.0
    assert len(await world.scheduler.look()) == 1


async def test_of_many_schedulers_that_look_at_once_one_posts(world: World) -> None:
    """Eight over one database, as of eight gateways; each sees that the schedule is due."""
    await world.add(Every(new_rollouts=1))
    for _ in range(5):
        await world.serve(2)
        posted = await asyncio.gather(*(world.build_scheduler().look() for _ in range(8)))
        (job,) = [job for jobs in posted for job in jobs]
        await world.end(job)
    assert len((await world.schedules.get("s")).runs) == 5


async def test_a_schedule_that_changed_since_it_was_found_due_posts_nothing(world: World) -> None:
    await world.add(Every(hours=1.0))
    found = await world.schedules.get("s")
    await world.schedules.pause("s", True)
    assert await world.schedules.post(found, {}) is None
    await world.schedules.pause("s", False)
    await world.schedules.delete("s")
    assert await world.schedules.post(found, {}) is None
    world.clock.now += 1.0
    await world.add(Every(hours=1.0))
    assert await world.schedules.post(found, {}) is None
    new = await world.schedules.get("s")
    job = await world.schedules.post(new, {})
    assert job is not None
    await world.end(job)
    assert await world.schedules.post(new, {}) is None
    assert len(await world.jobs.list()) == 1


async def test_a_paused_schedule_waits_and_then_counts_all(world: World) -> None:
    await world.add(Every(new_rollouts=2))
    await world.schedules.pause("s", True)
    await world.serve(2)
    assert await world.scheduler.look() == []
    await world.schedules.pause("s", False)
    assert len(await world.scheduler.look()) == 1


async def test_schedules_survive_a_restart(world: World, database_url: str, make_rollout: MakeRollout) -> None:
    await world.add(Every(new_rollouts=3))
    await world.serve(2)
    await world.scheduler.look()
    second = Database(database_url)
    second.migrate()
    restarted = World(second, make_rollout)
    restarted.clock.now = world.clock.now
    assert (await restarted.schedules.get("s")).last_look == {
        "at": world.clock.now,
        "new_rollouts": {"is_due": False, "num": 2},
    }
    restarted._num = world._num
    await restarted.serve(1)
    assert len(await restarted.scheduler.look()) == 1
    second.close()


async def test_a_fall_of_the_reward_posts_a_job_and_noise_does_not(world: World) -> None:
    """Windows of 30: the first is the measure, the second is the same, the third has fallen by one deviation.

    t is about -1 / sqrt(2 / 30) = -3.9 there; the p-values are of fixed draws and lie far on both sides of 0.01.
    """
    rng = np.random.default_rng(3)
    steady = rng.normal(1.0, 0.5, 30).tolist()
    await world.add(drift=Drift(reward="kindness", window=30, false_alarm=0.01))
    await world.serve_rewards([*steady, *steady[:29]])
    assert await world.scheduler.look() == []
    await world.serve_rewards(steady[29:])
    assert await world.scheduler.look() == []
    look = (await world.schedules.get("s")).last_look["drift"]
    assert (look["is_due"], look["window"], look["p_value"]) == (False, 1, pytest.approx(0.5))
    await world.serve_rewards([value - 0.5 for value in steady])
    (job,) = await world.scheduler.look()
    reason = (await world.schedules.get("s")).runs[0].reason["drift"]
    assert (reason["window"], reason["reward_version"]) == (2, "1")
    assert reason["older_mean"] - reason["newer_mean"] == pytest.approx(0.5)
    await world.end(job, "failed")
    assert await world.scheduler.look() == []  # this window has had its job
    await world.serve_rewards([value - 0.5 for value in steady])
    (again,) = await world.scheduler.look()  # nothing was learned, and it is still low
    await world.end(again)
    await world.serve_rewards([value - 0.5 for value in [*steady, *steady]])
    assert await world.scheduler.look() == []  # it has been trained on: this is the measure now


async def test_drift_compares_requests_of_one_version_of_the_reward(world: World) -> None:
    """A new version's scores, lower by nature, are not held against the old one's."""
    rng = np.random.default_rng(4)
    steady = rng.normal(1.0, 0.5, 30).tolist()
    await world.add(drift=Drift(reward="kindness", window=30, false_alarm=0.01))
    await world.serve_rewards(steady)
    low = [value - 5.0 for value in steady]
    await world.serve_rewards([*low, *low], version="2")
    assert await world.scheduler.look() == []
    look = (await world.schedules.get("s")).last_look["drift"]
    assert (look["reward_version"], look["window"], look["p_value"]) == ("2", 1, pytest.approx(0.5))


async def test_the_candidates_of_a_request_count_as_one(world: World) -> None:
    """31 requests of two candidates, 1 and 0, are one window of 30 and a beginning, not two windows."""
    traffic = SqlTraffic(world.database)
    for number in range(60):
        value = RewardValue(name="kindness", version="1", raw=float(number % 2))
        await world.serve(rewards=[value], request_id=f"pair{number // 2}")
    assert await traffic.reward_windows("kind", 0.0, reward="kindness", window=30) is None
    windows = await traffic.reward_windows("kind", 0.0, reward="kindness", window=15)
    assert windows is not None
    assert (windows.number, windows.older, windows.newer) == (1, (0.5,) * 15, (0.5,) * 15)


async def test_parts_of_a_mix_are_rewards_too_and_similar_names_are_not(world: World) -> None:
    part = RewardValue(name="kind_ess", version="1", raw=2.0)
    mix = RewardValue(name="mix", version="1", raw=9.0, parts=[part])
    traffic = SqlTraffic(world.database)
    await world.serve(4, rewards=[mix])
    await world.serve(4, rewards=[RewardValue(name="kindness", version="1", raw=0.0)])
    windows = await traffic.reward_windows("kind", 0.0, reward="kind_ess", window=2)
    assert windows is not None
    assert (windows.number, windows.older, windows.newer) == (1, (2.0, 2.0), (2.0, 2.0))


async def test_a_schedule_that_cannot_be_looked_at_does_not_stop_the_others(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await world.schedules.add("a", CONFIG, {"made by": "a newer version"})
    await world.add(Every(new_rollouts=1), name="b")
    await world.add(Every(hours=0.0001), name="c")
    await world.serve(1)

    async def fail(*_: object) -> int:
        raise StorageError("the database is away")

    monkeypatch.setattr(SqlTraffic, "num_usable", fail)
    (job,) = await world.scheduler.look()
    assert (await world.schedules.get("c")).runs[0].job_id == job
    assert "schedule a could not be looked at" in caplog.text
    assert "schedule b could not be looked at: the database is away" in caplog.text


async def test_names_are_unique_and_unknown_ones_are_not_found(world: World) -> None:
    await world.add(Every(hours=1.0))
    with pytest.raises(ConflictError, match="already"):
        await world.add(Every(hours=1.0))
    for call in (
        world.schedules.get("x"),
        world.schedules.get("a\x00b"),
        world.schedules.delete("x"),
        world.schedules.pause("x", True),
    ):
        with pytest.raises(NotFoundError):
            await call
