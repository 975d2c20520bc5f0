"""What the database selects is what `select_rollouts` defines."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from trimtab_adapters.contract.params import AdapterWeight
from trimtab_adapters.contract.records import RewardValue, Rollout
from trimtab_adapters.contract.rollout_filter import RolloutFilter, select_rollouts
from trimtab_server.storage.database import Database
from trimtab_server.storage.feedback import ChoiceName, SqlFeedback
from trimtab_server.storage.rollouts import SqlRolloutReader, insert_rollouts

pytestmark = pytest.mark.anyio

MakeRollout = Callable[..., Rollout]

CONDITIONS: dict[str, list[Any]] = {
    "route": ["kind", "calm"],
    "base_model": ["base", "other"],
    "adapter": ["kind", "calm"],
    "version": ["a" * 16, "b" * 16],
    "steered": [True, False],
    "endpoint": ["completions", "reference"],
    "request_id": ["q0", "q1"],
    "since": [2.0, 5.0],
    "until": [4.0, 8.0],
    "chosen_only": [True],
    "has_feedback": [True, False],
    "min_rating": [-0.5, 0.5],
    "max_rating": [-0.25, 0.25],
    "reward": ["kindness", "length"],
    "min_reward": [0.25, 0.75],
    "max_reward": [0.5],
    "min_calibrated": [0.5],
    "max_calibrated": [0.25, 0.75],
    "whole_requests": [True],
    "limit": [3],
}


def random_rollouts(make_rollout: MakeRollout, rng: random.Random) -> list[Rollout]:
    """20 requests of two candidates; quarters and halves, so that means and bounds meet exactly."""

    def reward(name: str) -> RewardValue:
        raw, calibrated = rng.choice([0.0, 0.25, 0.5, 0.75, float("nan")]), rng.choice([None, 0.25, 0.5, 1.0])
        return RewardValue(name=name, version="1", raw=raw, calibrated=calibrated)

    terms = [
        AdapterWeight(name="kind", version="a" * 16, alpha=1.0),
        AdapterWeight(name="calm", version="b" * 16, alpha=0.0),
    ]
    return [
        make_rollout(
            f"{number:02}-{index}",
            float(number // 2),
            request_id=f"q{number}",
            route=rng.choice(["kind", "calm"]),
            base_model=rng.choice(["base", "other"]),
            endpoint=rng.choice(["completions", "reference"]),
            steering=[term for term in terms if rng.random() < 0.5],
            candidate_index=index,
            chosen=index == 0,
            choice_index=index,
            rewards=[reward(name) for name in ("kindness", "length", "kindness") if rng.random() < 0.6],
        )
        for number in range(20)
        for index in range(2)
    ]


async def test_sql_selects_what_the_definition_selects(database: Database, make_rollout: MakeRollout) -> None:
    """400 random filters of one to four conditions over 40 random rollouts; the seed is fixed."""
    rng = random.Random(5)
    rollouts = random_rollouts(make_rollout, rng)
    with database.writing() as connection:
        insert_rollouts(database, connection, rollouts)

    async def flush() -> None:
        """Everything is there."""

    desk = SqlFeedback(database, flush, clock=lambda: 1.0)
    for rollout in rollouts:
        for user in ("ann", "bob"):
            if rng.random() < 0.4:
                choice = ChoiceName(rollout.candidate_index, completion_id=rollout.request_id)
                rating = rng.choice([None, -1.0, -0.5, 0.0, 0.5, 1.0])
                await desk.put(choice, user=user, rating=rating, comment="seen")
    reader = SqlRolloutReader(database)
    logged = [rollout async for rollout in reader.read(RolloutFilter())]
    assert {len(rollout.feedback) for rollout in logged} == {0, 1, 2}
    sizes = set()
    for _ in range(400):
        names = rng.sample(sorted(CONDITIONS), rng.randint(1, 4))
        given = {name: rng.choice(CONDITIONS[name]) for name in names}
        if any(name.endswith(("_reward", "_calibrated")) for name in given):
            given.setdefault("reward", "kindness")
        where = RolloutFilter(**given)
        found = [rollout.id async for rollout in reader.read(where)]
        assert found == [rollout.id for rollout in select_rollouts(logged, where)], given
        sizes.add(len(found))
    assert len(sizes) > 10  # not all or nothing


async def test_whole_requests_bring_the_candidates_that_do_not_match(
    database: Database, make_rollout: MakeRollout
) -> None:
    high, low = (RewardValue(name="r", version="1", raw=raw) for raw in (0.9, 0.1))
    with database.writing() as connection:
        batch = [
            make_rollout("1", request_id="a", rewards=[high]),
            make_rollout("2", request_id="a", rewards=[low], chosen=False),
            make_rollout("3", request_id="b", rewards=[low]),
        ]
        insert_rollouts(database, connection, batch)
    reader = SqlRolloutReader(database)

    async def ids(**given: Any) -> list[str]:
        return [rollout.id async for rollout in reader.read(RolloutFilter(reward="r", min_reward=0.5, **given))]

    assert await ids() == ["1"]
    assert await ids(whole_requests=True) == ["1", "2"]
    assert await ids(whole_requests=True, chosen_only=True) == ["1"]


def test_bounds_without_a_reward_are_refused() -> None:
    for bound in ("min_reward", "max_reward", "min_calibrated", "max_calibrated"):
        with pytest.raises(ValidationError, match="`reward`, its name"):
            RolloutFilter(**{bound: 0.5})


def test_the_definition_by_hand(make_rollout: MakeRollout) -> None:
    kind = AdapterWeight(name="kind", version="a" * 16, alpha=0.0)
    rollouts = [make_rollout("1", 1.0, steering=[kind]), make_rollout("2", 2.0), make_rollout("3", 3.0, chosen=False)]

    def ids(**given: Any) -> list[str]:
        return [rollout.id for rollout in select_rollouts(rollouts, RolloutFilter(**given))]

    assert ids() == ["1", "2", "3"]
    assert ids(steered=True) == ["2", "3"]  # a weight of 0 does not steer
    assert ids(adapter="kind") == ["1", "2", "3"]
    assert ids(since=2.0) == ["2", "3"]  # its beginning is in, its end is not
    assert ids(until=2.0) == ["1"]
    assert ids(chosen_only=True) == ["1", "2"]
    assert ids(limit=2) == ["1", "2"]
    assert ids(reward="kindness", min_reward=0.5, max_reward=0.5) == ["1", "2", "3"]  # the fixture's, both ends in
    assert ids(reward="kindness", min_calibrated=0.76) == []
    assert ids(reward="other") == []
    assert ids(has_feedback=True) == []
    assert ids(max_rating=1.0) == []  # no rating is no rating of 0
