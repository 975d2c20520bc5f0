"""What is counted for a canary, and how the watcher ends it."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from trimtab_adapters.contract.errors import (
    ConflictError,
    EngineDiedError,
    InvalidRequestError,
    StorageError,
    TrimtabError,
)
from trimtab_adapters.contract.params import AdapterWeight
from trimtab_adapters.contract.records import RewardValue
from trimtab_server.canary.watcher import CanaryWatcher
from trimtab_server.decoding.candidates import Selection
from trimtab_server.decoding.job import GenerationJob, JobResult, PromptInput, PromptResult
from trimtab_server.engine.base import Candidate
from trimtab_server.sse import ClientDisconnectedError
from trimtab_server.storage.base import Canary, CanaryArm, ResolvedModel, RouteRevision

pytestmark = pytest.mark.anyio

NEW = "b" * 16
WEIGHT = AdapterWeight(name="kind", version=NEW, alpha=1.0)
CANARY = Canary(NEW, (WEIGHT,), 10.0, num_answers=8, min_answers=4, timeout_s=60.0)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Routes:
    """Routes in memory; ends of canaries are noted, or fail."""

    revisions: dict[str, RouteRevision] = field(default_factory=dict)
    ended: list[tuple[str, int, bool, str]] = field(default_factory=list)
    error: TrimtabError | None = None

    async def routes(self) -> Sequence[RouteRevision]:
        return list(self.revisions.values())

    async def end_canary(self, route: str, revision: int, *, is_promoted: bool, comment: str) -> RouteRevision:
        if self.error is not None:
            raise self.error
        self.ended.append((route, revision, is_promoted, comment))
        current = self.revisions[route]
        self.revisions[route] = replace(current, revision=revision + 1, canary=None)
        return self.revisions[route]


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class World:
    routes: Routes
    clock: Clock
    watcher: CanaryWatcher

    def answer(self, *, is_canary: bool, reward: float | None = None, by: str = "r", revision: int = 2) -> None:
        arm = CanaryArm(revision, NEW, 10.0, is_canary)
        resolved = ResolvedModel("kind", "base", (), 1, "r", canary=arm)
        self.watcher.answered(result(resolved, [reward], by=by))

    def fail(self, error: BaseException, *, is_canary: bool) -> None:
        arm = CanaryArm(2, NEW, 10.0, is_canary)
        self.watcher.failed(ResolvedModel("kind", "base", (), canary=arm), error)


def result(resolved: ResolvedModel, rewards: Sequence[float | None], by: str = "r") -> JobResult:
    job = GenerationJob(
        id="cmpl-1",
        endpoint="completions",
        resolved=resolved,
        prompts=(PromptInput({"prompt": "p"}, "p"),),
        body={},
        n=len(rewards),
        num_candidates=len(rewards),
        reward=by,
    )
    candidate = Candidate.__new__(Candidate)
    selections = [
        Selection(candidate, None if raw is None else RewardValue(name="r", version="1", raw=raw), rank, len(rewards))
        for rank, raw in enumerate(rewards)
    ]
    return JobResult(job, [PromptResult(selections)], 1.0)


@pytest.fixture
def world() -> World:
    routes, clock = Routes(), Clock()
    routes.revisions["kind"] = RouteRevision("kind", 2, (), reward="r", created_at=1000.0, canary=CANARY)
    routes.revisions["other"] = RouteRevision("other", 1, ())
    return World(routes, clock, CanaryWatcher(routes, clock=clock))


async def test_a_canary_as_good_as_the_rest_is_promoted(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for i in range(8):
        assert world.routes.ended == []
        world.answer(is_canary=True, reward=float(i % 2))
        world.answer(is_canary=False, reward=float(i % 2))
        await world.watcher.look()
    comment = f"canary {NEW} promoted: not worse over 8 requests, beside 8 others"
    assert world.routes.ended == [("kind", 2, True, comment)]
    assert f"route kind: {comment}" in caplog.text
    await world.watcher.look()
    assert len(world.routes.ended) == 1


async def test_a_canary_with_lower_rewards_is_rolled_back(world: World, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(4):
        world.answer(is_canary=True, reward=float(i % 2))
        world.answer(is_canary=False, reward=100.0 + i % 2)
    await world.watcher.look()
    ((route, revision, is_promoted, comment),) = world.routes.ended
    assert (route, revision, is_promoted) == ("kind", 2, False)
    assert comment.startswith(f"canary {NEW} rolled back: its mean reward is 0.5 instead of 100.5")
    assert [record.levelname for record in caplog.records] == ["WARNING"]


async def test_faults_of_the_server_count_and_others_do_not(world: World) -> None:
    for error in (InvalidRequestError("yours"), ClientDisconnectedError(), ConnectionResetError()):
        world.fail(error, is_canary=True)
    revision = world.routes.revisions["kind"]
    assert world.watcher.outcomes(revision).canary.num_errors == 0
    world.fail(EngineDiedError("died"), is_canary=True)
    world.fail(RuntimeError("a bug"), is_canary=True)
    world.fail(EngineDiedError("died"), is_canary=False)
    outcomes = world.watcher.outcomes(revision)
    assert (outcomes.canary.num_errors, outcomes.stable.num_errors) == (2, 1)


async def test_errors_alone_roll_a_canary_back(world: World) -> None:
    for _ in range(20):
        world.answer(is_canary=False)
    for _ in range(4):
        world.fail(EngineDiedError("died"), is_canary=True)
    await world.watcher.look()
    ((_, _, is_promoted, comment),) = world.routes.ended
    assert not is_promoted
    assert "100.0% of its requests failed" in comment


async def test_only_the_routes_own_reward_is_compared(world: World) -> None:
    world.answer(is_canary=True, reward=1.0, by="another")
    world.answer(is_canary=True, reward=None)
    world.answer(is_canary=True, reward=3.0)
    outcomes = world.watcher.outcomes(world.routes.revisions["kind"])
    assert (outcomes.canary.num_answers, outcomes.canary.num_rewards, outcomes.canary.mean) == (3, 1, 3.0)


def test_the_reward_of_an_answer_is_the_mean_of_its_choices_when_all_have_one(world: World) -> None:
    resolved = ResolvedModel("kind", "base", (), 1, "r", canary=CanaryArm(2, NEW, 10.0, True))
    world.watcher.answered(result(resolved, [1.0, 2.0]))
    world.watcher.answered(result(resolved, [1.0, None]))
    outcomes = world.watcher.outcomes(world.routes.revisions["kind"])
    assert (outcomes.canary.num_answers, outcomes.canary.num_rewards, outcomes.canary.mean) == (2, 1, 1.5)


async def test_requests_outside_of_a_canary_are_not_counted(world: World) -> None:
    resolved = ResolvedModel("kind", "base", (), 1, "r")
    world.watcher.answered(result(resolved, [1.0]))
    world.watcher.failed(resolved, EngineDiedError("died"))
    outcomes = world.watcher.outcomes(world.routes.revisions["kind"])
    assert outcomes.canary.num_requests == outcomes.stable.num_requests == 0


async def test_time_ends_a_canary_that_nobody_asks(world: World) -> None:
    world.clock.now = 1059.0
    await world.watcher.look()
    assert world.routes.ended == []
    world.clock.now = 1060.0
    await world.watcher.look()
    assert world.routes.ended[0][2:] == (
        False,
        f"canary {NEW} rolled back: after 60 s only 0 of at least 4 requests have come",
    )


async def test_an_end_that_fails_is_tried_again(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.clock.now = 2000.0
    world.routes.error = StorageError("the disk is full")
    await world.watcher.look()
    assert "could not be ended: the disk is full" in caplog.text
    world.routes.error = ConflictError("changed")  # somebody else did it
    await world.watcher.look()
    world.routes.error = None
    await world.watcher.look()
    assert len(world.routes.ended) == 1


async def test_late_answers_of_a_canary_that_is_over_are_forgotten(world: World) -> None:
    world.answer(is_canary=True, revision=1)
    await world.watcher.look()
    earlier = replace(world.routes.revisions["kind"], revision=1)
    assert world.watcher.outcomes(earlier).canary.num_answers == 0
