"""The queue of training jobs: one worker each, abandoned ones go on, ends are final."""

import asyncio
import contextlib
import itertools

import pytest

from trimtab_adapters.contract.errors import ConflictError, NotFoundError
from trimtab_server.storage.base import JobLine
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


async def test_two_workers_never_run_one_job(database: Database) -> None:
    """Twelve workers race for four jobs whose leases run out all the time: nobody sends a heartbeat, and 20 ms is a
    lease. Whenever two claims of a job overlap in time, the later one must begin a lease after the earlier one.
    """
    lease_s = 0.02
    jobs = TrainingJobs(database, lease_s=lease_s, max_lost=1000)
    for number in range(4):
        await jobs.submit({"n": number})
    claims: list[tuple[str, int, float]] = []

    async def work(worker: str) -> None:
        for _ in range(25):
            if (job := await jobs.claim(worker)) is not None:
                claims.append((job.id, job.attempt, job.updated_at))
                with contextlib.suppress(ConflictError):  # another has it by now
                    assert (await jobs.heartbeat(job.id, worker, {}, attempt=job.attempt)).attempt == job.attempt

    await asyncio.gather(*(work(f"w{number}") for number in range(12)))
    assert len({(job_id, attempt) for job_id, attempt, _ in claims}) == len(claims)  # each attempt is one worker's
    assert len(claims) > 12
    for job_id in {job_id for job_id, _, _ in claims}:
        mine = sorted((attempt, at) for found, attempt, at in claims if found == job_id)
        assert [attempt for attempt, _ in mine] == list(range(1, len(mine) + 1))
        assert all(later - earlier > lease_s for (_, earlier), (_, later) in itertools.pairwise(mine))


async def test_an_older_attempt_of_the_same_worker_is_over(jobs: TrainingJobs, clock: Clock) -> None:
    job = await jobs.submit({"n": 1})
    first = await jobs.claim("w")
    clock.now += 200
    second = await jobs.claim("w")
    assert first is not None
    assert second is not None
    assert (first.attempt, second.attempt) == (1, 2)
    for call in (
        jobs.heartbeat(job.id, "w", {}, attempt=1),
        jobs.finish(job.id, "w", "succeeded", attempt=1),
        jobs.release(job.id, "w", attempt=1),
    ):
        with pytest.raises(ConflictError, match=r"worked on by 'w' in attempt 2"):
            await call
    assert (await jobs.heartbeat(job.id, "w", {}, attempt=2)).state == "running"


async def test_a_released_job_is_claimed_at_once_before_younger_ones(jobs: TrainingJobs) -> None:
    job, younger = await jobs.submit({"n": 1}), await jobs.submit({"n": 2})
    await jobs.claim("w1")
    assert (await jobs.release(job.id, "w1", attempt=1)).state == "queued"
    assert (await jobs.release(job.id, "w1", attempt=1)).state == "queued"  # the answer was lost, it asks again
    again = await jobs.claim("w2")
    assert again is not None
    assert (again.id, again.attempt, again.worker) == (job.id, 2, "w2")
    with pytest.raises(ConflictError):
        await jobs.release(job.id, "w1", attempt=1)
    assert younger.state == "queued"


def log(attempt: int, *numbers: int) -> list[JobLine]:
    return [JobLine(attempt, number, f"line {number}\x00") for number in numbers]


def metrics(attempt: int, *steps: tuple[int, str]) -> list[JobLine]:
    return [
        JobLine(attempt, number, {"figures": {name: 0.5}}, float(step)) for number, (step, name) in enumerate(steps, 1)
    ]


async def test_log_lines_are_kept_once_and_the_newest_only(database: Database) -> None:
    jobs = TrainingJobs(database, num_lines=4)
    job = await jobs.submit({"n": 1})
    await jobs.claim("w")
    await jobs.heartbeat(job.id, "w", {}, attempt=1, log=log(1, 1, 2, 3))
    await jobs.heartbeat(job.id, "w", {}, attempt=1, log=log(1, 2, 3, 5))  # sent again, and one more after a gap
    found = await jobs.lines(job.id, "log", tail=10)
    assert [(line.number, line.content) for line in found] == [(n, f"line {n}\x00") for n in (1, 2, 3, 5)]
    await jobs.heartbeat(job.id, "w", {}, attempt=1, log=log(1, 6))
    assert [line.number for line in await jobs.lines(job.id, "log", tail=10)] == [2, 3, 5, 6]
    assert [line.number for line in await jobs.lines(job.id, "log", tail=2)] == [5, 6]
    assert await jobs.lines(job.id, "metrics", tail=10) == []
    with pytest.raises(NotFoundError):
        await jobs.lines("job-" + "0" * 32, "log", tail=1)


async def test_metrics_of_steps_that_are_taken_again_are_replaced(jobs: TrainingJobs, clock: Clock) -> None:
    """The first attempt got to step 4, its checkpoint was at 2, so the second begins with the round of 2."""
    job = await jobs.submit({"n": 1})
    await jobs.claim("w")
    first = metrics(1, (1, "loss"), (2, "loss"), (2, "round"), (3, "loss"), (4, "loss"))
    await jobs.heartbeat(job.id, "w", {}, attempt=1, metrics=first)
    clock.now += 200
    await jobs.claim("w")
    await jobs.heartbeat(job.id, "w", {}, attempt=2, metrics=metrics(2, (2, "round"), (3, "loss")))
    found = await jobs.lines(job.id, "metrics", tail=10)
    assert [(line.attempt, line.step, *line.content["figures"]) for line in found] == [
        (1, 1, "loss"),
        (1, 2, "loss"),
        (2, 2, "round"),
        (2, 3, "loss"),
    ]


async def test_the_last_words_of_a_cancelled_job_are_kept_but_not_those_of_a_lost_one(
    jobs: TrainingJobs, clock: Clock
) -> None:
    job = await jobs.submit({"n": 1})
    await jobs.claim("w")
    clock.now += 200
    await jobs.claim("w2")
    with pytest.raises(ConflictError):
        await jobs.heartbeat(job.id, "w", {}, attempt=1, log=log(1, 1))
    await jobs.cancel(job.id)
    assert (await jobs.heartbeat(job.id, "w2", {}, attempt=2, log=log(2, 1))).state == "cancelled"
    assert [(line.attempt, line.number) for line in await jobs.lines(job.id, "log", tail=9)] == [(2, 1)]


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


async def test_a_job_that_loses_every_worker_fails_in_the_end(database: Database, clock: Clock) -> None:
    """Three may be lost in a row; the fourth claim after them gives the job up and takes the next one."""
    jobs = TrainingJobs(database, lease_s=100.0, max_lost=3, clock=clock)
    deadly, harmless = await jobs.submit({"n": 1}), await jobs.submit({"n": 2})
    for attempt in range(1, 5):
        claimed = await jobs.claim(f"w{attempt}")
        assert claimed is not None
        assert (claimed.id, claimed.attempt) == (deadly.id, attempt)
        await jobs.heartbeat(deadly.id, f"w{attempt}", {"step": 7})
        clock.now += 101.0
    claimed = await jobs.claim("w5")
    assert claimed is not None
    assert claimed.id == harmless.id
    found = await jobs.get(deadly.id)
    assert found.state == "failed"
    assert "4 workers in a row were lost with this job at step 7" in str(found.error)


async def test_a_job_that_gets_further_may_lose_any_number_of_workers(database: Database, clock: Clock) -> None:
    jobs = TrainingJobs(database, lease_s=100.0, max_lost=1, clock=clock)
    job = await jobs.submit({})
    for attempt in range(1, 10):
        assert await jobs.claim(f"w{attempt}") is not None
        await jobs.heartbeat(job.id, f"w{attempt}", {"step": attempt})
        clock.now += 101.0
    assert (await jobs.get(job.id)).state == "running"


async def test_a_job_that_is_handed_back_was_not_lost(database: Database, clock: Clock) -> None:
    jobs = TrainingJobs(database, lease_s=100.0, max_lost=1, clock=clock)
    job = await jobs.submit({})
    for attempt in range(1, 6):
        assert await jobs.claim(f"w{attempt}") is not None
        await jobs.release(job.id, f"w{attempt}")
    assert (await jobs.get(job.id)).state == "queued"
