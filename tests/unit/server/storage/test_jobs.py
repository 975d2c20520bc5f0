"""The queue of training jobs: one worker each, abandoned ones go on, ends are final."""

import asyncio

import pytest

from trimtab_adapters.contract.errors import ConflictError, NotFoundError
from trimtab_server.storage.database import Database
from trimtab_server.storage.jobs import TrainingJobs

pytestmark = pytest.mark.anyio


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def jobs(database: Database, clock: Clock) -> TrainingJobs:
    return TrainingJobs(database, lease_s=100.0, clock=clock)


async def test_a_job_is_queued_claimed_worked_on_and_finished(jobs: TrainingJobs) -> None:
    submitted = await jobs.submit({"steps": 3}, name="first")
    assert (submitted.state, submitted.config, submitted.name) == ("queued", {"steps": 3}, "first")
    claimed = await jobs.claim("w1")
    assert claimed is not None
    assert (claimed.id, claimed.state, claimed.worker) == (submitted.id, "running", "w1")
    beat = await jobs.heartbeat(submitted.id, "w1", {"step": 2})
    assert (beat.state, beat.progress) == ("running", {"step": 2})
    done = await jobs.finish(submitted.id, "w1", "succeeded", version="a" * 16, evaluation={"reward": 0.5})
    assert (done.state, done.version, done.evaluation, done.error) == ("succeeded", "a" * 16, {"reward": 0.5}, None)
    assert await jobs.get(submitted.id) == done
    assert await jobs.claim("w1") is None


async def test_the_oldest_job_is_claimed_first_and_the_list_is_newest_first(jobs: TrainingJobs) -> None:
    first, second = await jobs.submit({"n": 1}), await jobs.submit({"n": 2})
    assert [job.id for job in await jobs.list()] == [second.id, first.id]
    claimed = await jobs.claim("w")
    assert claimed is not None
    assert claimed.id == first.id
    assert [job.id for job in await jobs.list("queued")] == [second.id]


async def test_workers_that_claim_at_once_get_different_jobs(jobs: TrainingJobs) -> None:
    for number in range(5):
        await jobs.submit({"n": number})
    claims = await asyncio.gather(*(jobs.claim(f"w{number}") for number in range(8)))
    got = [job.id for job in claims if job is not None]
    assert len(got) == len(set(got)) == 5


async def test_an_abandoned_job_goes_to_another_worker_and_the_first_is_told_to_stop(
    jobs: TrainingJobs, clock: Clock
) -> None:
    job = await jobs.submit({"n": 1})
    await jobs.claim("w1")
    clock.now += 90
    await jobs.heartbeat(job.id, "w1", {})
    clock.now += 90
    assert await jobs.claim("w2") is None  # 92 s since the heartbeat: still held
    clock.now += 10
    again = await jobs.claim("w2")
    assert again is not None
    assert (again.id, again.worker) == (job.id, "w2")
    with pytest.raises(ConflictError, match="now worked on by 'w2'"):
        await jobs.heartbeat(job.id, "w1", {})
    with pytest.raises(ConflictError, match="now worked on by 'w2'"):
        await jobs.finish(job.id, "w1", "succeeded")


async def test_a_cancelled_job_is_not_claimed_and_its_worker_learns_of_it(jobs: TrainingJobs) -> None:
    queued, running = await jobs.submit({"n": 1}), await jobs.submit({"n": 2})
    await jobs.cancel(queued.id)
    await jobs.claim("w")
    assert (await jobs.cancel(running.id)).state == "cancelled"
    assert (await jobs.cancel(running.id)).state == "cancelled"
    assert (await jobs.heartbeat(running.id, "w", {"step": 9})).state == "cancelled"
    assert (await jobs.finish(running.id, "w", "failed", error="stopped")).state == "cancelled"
    assert await jobs.claim("w") is None


async def test_an_end_may_be_reported_again_but_not_changed(jobs: TrainingJobs) -> None:
    job = await jobs.submit({"n": 1})
    await jobs.claim("w")
    failed = await jobs.finish(job.id, "w", "failed", error="NaN loss\x00")
    assert failed.error == "NaN loss\x00"
    assert await jobs.finish(job.id, "w", "failed", error="again") == failed
    with pytest.raises(ConflictError, match="is failed, not running"):
        await jobs.finish(job.id, "w", "succeeded")
    with pytest.raises(ConflictError, match="is failed, not running"):
        await jobs.heartbeat(job.id, "w", {})
    with pytest.raises(ConflictError, match="has failed"):
        await jobs.cancel(job.id)


@pytest.mark.parametrize("job_id", ["job-" + "0" * 32, "x", "a\x00b"])
async def test_an_unknown_job_is_not_found(jobs: TrainingJobs, job_id: str) -> None:
    for call in (
        jobs.get(job_id),
        jobs.cancel(job_id),
        jobs.heartbeat(job_id, "w", {}),
        jobs.finish(job_id, "w", "failed"),
    ):
        with pytest.raises(NotFoundError):
            await call
