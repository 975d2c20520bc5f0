"""Per-prompt calibrators: from memory, from the store, or drawn."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from typing_extensions import override

from trimtab_adapters.contract.calibration import ReferenceScores, prompt_key
from trimtab_adapters.contract.errors import (
    EngineError,
    EngineUnavailableError,
    InvalidRequestError,
    RewardError,
    StorageError,
)
from trimtab_adapters.contract.records import RewardValue
from trimtab_adapters.contract.rewards import RewardInput
from trimtab_server.decoding.reference import MemoryCalibratorStore, ReferenceCalibrators
from trimtab_server.rewards.batching import BatchedReward
from trimtab_server.rewards.callable import CallableReward
from trimtab_server.rewards.resolved import ResolvedReward
from trimtab_server.storage.base import LoggedSample

pytestmark = pytest.mark.anyio

TEXTS = ["a", "bb", "ccc", "dddd", "eeeee", "ffffff", "ggggggg", "hhhhhhhh"]


def length_reward(version: str = "1") -> BatchedReward:
    return BatchedReward(CallableReward("length", version, lambda inputs: [len(item.output) for item in inputs]))


def alone(reward: BatchedReward) -> ResolvedReward:
    return ResolvedReward(reward.name, reward.version, (reward,))


def scores_of(*scores: float, reward: str = "length@1") -> ReferenceScores:
    return ReferenceScores(tuple((score,) for score in scores), reference="base", reward=reward)


async def get(
    calibrators: ReferenceCalibrators,
    draw: Any,
    *,
    reward: BatchedReward | None = None,
    ids: Sequence[int] = (1, 2),
    prompt: str = "p",
    size: int | None = None,
) -> ReferenceScores:
    return await calibrators.get(
        prompt=prompt, prompt_token_ids=ids, reward=alone(reward or length_reward()), draw_reference=draw, size=size
    )


async def settle() -> None:
    """Let every task that can go on go on: each pass runs all tasks to their next wait."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_calibrator_is_drawn_scored_kept_and_stored(scripted_draw: Any) -> None:
    store = MemoryCalibratorStore()
    calibrators = ReferenceCalibrators(store, default_size=3)
    draw = scripted_draw(list(TEXTS))
    calibrator = await get(calibrators, draw)
    assert calibrator == scores_of(1.0, 2.0, 3.0)
    assert await store.get(prompt_key([1, 2], "p"), "length@1", "base") == calibrator
    assert await get(calibrators, draw) == calibrator
    assert draw.asked == [3]


async def test_the_store_saves_the_draw(scripted_draw: Any) -> None:
    store = MemoryCalibratorStore()
    first = await get(ReferenceCalibrators(store, default_size=3), scripted_draw(list(TEXTS)))
    draw = scripted_draw([])
    assert await get(ReferenceCalibrators(store, default_size=3), draw) == first
    assert draw.asked == []


async def test_fifty_callers_at_once_share_one_draw(scripted_draw: Any) -> None:
    gate = asyncio.Event()
    draw = scripted_draw(list(TEXTS), gate=gate.wait)
    calibrators = ReferenceCalibrators(MemoryCalibratorStore(), default_size=4)
    tasks = [asyncio.create_task(get(calibrators, draw)) for _ in range(50)]
    await settle()
    assert draw.asked == [4]
    gate.set()
    results = await asyncio.gather(*tasks)
    assert draw.asked == [4]
    assert {result.rows for result in results} == {scores_of(1.0, 2.0, 3.0, 4.0).rows}


@pytest.mark.parametrize("from_store", [False, True])
async def test_a_larger_size_draws_only_what_is_missing(scripted_draw: Any, from_store: bool) -> None:
    store = MemoryCalibratorStore()
    calibrators = ReferenceCalibrators(store, default_size=3)
    draw = scripted_draw(list(TEXTS))
    await get(calibrators, draw)
    if from_store:
        calibrators = ReferenceCalibrators(store)
    assert (await get(calibrators, draw, size=5)) == scores_of(1.0, 2.0, 3.0, 4.0, 5.0)
    assert (await get(calibrators, draw, size=2)).size == 5
    assert draw.asked == [3, 2]
    stored = await store.get(prompt_key([1, 2], "p"), "length@1", "base")
    assert stored is not None
    assert stored.size == 5


async def test_a_larger_size_that_arrives_during_a_draw_draws_the_rest_after_it(scripted_draw: Any) -> None:
    gate = asyncio.Event()
    draw = scripted_draw(list(TEXTS), gate=gate.wait)
    calibrators = ReferenceCalibrators(MemoryCalibratorStore())
    small, *large = [asyncio.create_task(get(calibrators, draw, size=size)) for size in (2, 6, 6)]
    await settle()
    gate.set()
    assert (await small).size == 2
    assert [result.size for result in await asyncio.gather(*large)] == [6, 6]
    assert draw.asked == [2, 4]


@pytest.mark.parametrize(
    "other", [{"ids": (1, 3)}, {"prompt": "q"}, {"reward": length_reward("2")}, {"key": "base at temperature 2"}]
)
async def test_another_prompt_reward_version_or_reference_has_its_own_calibrator(
    scripted_draw: Any, other: dict[str, Any]
) -> None:
    calibrators = ReferenceCalibrators(MemoryCalibratorStore(), default_size=2)
    await get(calibrators, scripted_draw(list(TEXTS)))
    draw = scripted_draw(list(TEXTS), key=other.pop("key", "base"))
    await get(calibrators, draw, **other)
    assert draw.asked == [2]


async def test_a_failed_draw_reaches_all_who_wait_and_is_not_kept(scripted_draw: Any) -> None:
    gate = asyncio.Event()
    draw = scripted_draw(list(TEXTS), gate=gate.wait, error=EngineUnavailableError("no engine is ready"))
    calibrators = ReferenceCalibrators(MemoryCalibratorStore(), default_size=2)
    tasks = [asyncio.create_task(get(calibrators, draw)) for _ in range(5)]
    await settle()
    gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, EngineUnavailableError) for result in results)
    assert draw.asked == [2]
    draw.error = None
    assert (await get(calibrators, draw)).size == 2


async def test_a_failed_reward_reaches_the_caller_and_is_not_kept(scripted_draw: Any) -> None:
    def fail(inputs: Sequence[RewardInput]) -> list[float]:
        raise RewardError("the judge is away")

    calibrators = ReferenceCalibrators(MemoryCalibratorStore(), default_size=2)
    with pytest.raises(RewardError, match="the judge is away"):
        await get(calibrators, scripted_draw(list(TEXTS)), reward=BatchedReward(CallableReward("length", "1", fail)))
    assert (await get(calibrators, scripted_draw(list(TEXTS)))).size == 2


async def test_too_few_rollouts_are_an_error(scripted_draw: Any) -> None:
    with pytest.raises(EngineError, match="1 of 2 reference rollouts"):
        await get(ReferenceCalibrators(MemoryCalibratorStore(), default_size=2), scripted_draw(["a"]))


async def test_the_first_caller_may_leave_without_harm_to_the_others(scripted_draw: Any) -> None:
    gate = asyncio.Event()
    draw = scripted_draw(list(TEXTS), gate=gate.wait)
    calibrators = ReferenceCalibrators(MemoryCalibratorStore(), default_size=2)
    first, second = [asyncio.create_task(get(calibrators, draw)) for _ in range(2)]
    await settle()
    first.cancel()
    await asyncio.wait([first])
    gate.set()
    assert (await second).size == 2
    assert draw.asked == [2]


async def test_the_draw_is_cancelled_with_the_last_caller_and_a_new_one_draws_again(scripted_draw: Any) -> None:
    gate = asyncio.Event()
    draw = scripted_draw(list(TEXTS), gate=gate.wait)
    calibrators = ReferenceCalibrators(MemoryCalibratorStore(), default_size=2)
    tasks = [asyncio.create_task(get(calibrators, draw)) for _ in range(2)]
    await settle()
    for task in tasks:
        task.cancel()
    fresh = scripted_draw(list(TEXTS))
    newcomer = asyncio.create_task(get(calibrators, fresh))
    await asyncio.wait(tasks)
    assert (await newcomer).size == 2
    assert draw.was_cancelled
    assert fresh.asked == [2]


async def test_a_calibrator_that_cannot_be_stored_is_still_used(
    scripted_draw: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(MemoryCalibratorStore):
        @override
        async def put(self, prompt_key: str, calibrator: ReferenceScores) -> None:
            raise StorageError("the disk is full")

    calibrators = ReferenceCalibrators(Full(), default_size=2)
    draw = scripted_draw(list(TEXTS))
    with caplog.at_level(logging.WARNING):
        assert (await get(calibrators, draw)).size == 2
    assert "the disk is full" in caplog.text
    await get(calibrators, draw)
    assert draw.asked == [2]


async def test_memory_is_bounded_and_forgets_the_least_recently_used() -> None:
    store = MemoryCalibratorStore(max_size=2)
    for key in ("a", "b"):
        await store.put(key, ReferenceScores.fit([[0.0]], reference="base", reward="r@1"))
    await store.get("a", "r@1", "base")
    await store.put("c", ReferenceScores.fit([[0.0]], reference="base", reward="r@1"))
    assert await store.get("a", "r@1", "base") is not None
    assert await store.get("b", "r@1", "base") is None
    assert await store.get("c", "r@1", "base") is not None


async def test_a_size_below_one_is_refused(scripted_draw: Any) -> None:
    with pytest.raises(InvalidRequestError, match="at least 1"):
        await get(ReferenceCalibrators(MemoryCalibratorStore()), scripted_draw([]), size=0)
    with pytest.raises(ValueError, match="at least 1"):
        ReferenceCalibrators(MemoryCalibratorStore(), default_size=0)


@dataclass
class ListedSamples:
    """A `SampleLog` over a list; fails on demand."""

    samples: list[LoggedSample]
    error: StorageError | None = None
    asked: list[tuple[str, tuple[int, ...], int]] = field(default_factory=list)

    async def of_prompt(self, policy: str, prompt_token_ids: Sequence[int], *, limit: int) -> Sequence[LoggedSample]:
        self.asked.append((policy, tuple(prompt_token_ids), limit))
        if self.error is not None:
            raise self.error
        return self.samples[:limit]


def sample(text: str, *, prompt: str | None = "p", rewards: Sequence[RewardValue] = ()) -> LoggedSample:
    return LoggedSample(prompt, (1, 2), text, tuple(rewards))


async def test_logged_samples_are_taken_first_and_only_the_rest_is_drawn(scripted_draw: Any) -> None:
    log = ListedSamples([sample(text) for text in TEXTS[:3]])
    calibrators = ReferenceCalibrators(MemoryCalibratorStore(), log)
    draw = scripted_draw(["x" * 9, "x" * 10])
    assert await get(calibrators, draw, size=5) == scores_of(1.0, 2.0, 3.0, 9.0, 10.0)
    assert (draw.asked, log.asked) == ([2], [("base", (1, 2), 5)])


async def test_what_is_kept_and_what_is_logged_are_never_added_up(scripted_draw: Any) -> None:
    # The four that are drawn first reach the log; later they must not count twice.
    store, log = MemoryCalibratorStore(), ListedSamples([])
    await get(ReferenceCalibrators(store, log), scripted_draw(list(TEXTS[:4])), size=4)
    log.samples = [sample(text) for text in TEXTS[:4]]
    draw = scripted_draw(["x" * 9, "x" * 10])
    calibrators = ReferenceCalibrators(store, log)
    assert await get(calibrators, draw, size=6) == scores_of(1.0, 2.0, 3.0, 4.0, 9.0, 10.0)
    # Another gateway has drawn as well: the log has more than is kept, and is taken as a whole.
    log.samples = [sample("y" * length) for length in range(1, 8)]
    assert await get(calibrators, draw, size=7) == scores_of(*range(1, 8))
    assert draw.asked == [2]


async def test_rewards_in_the_log_are_used_if_they_are_of_the_same_version_and_prompt_text(scripted_draw: Any) -> None:
    scored: list[str] = []

    def length(inputs: Sequence[RewardInput]) -> list[float]:
        scored.extend(item.output for item in inputs)
        return [float(len(item.output)) for item in inputs]

    def value(version: str, raw: float) -> RewardValue:
        return RewardValue(name="length", version=version, raw=raw)

    mix = RewardValue(name="mix", version="1", raw=0.1, parts=[value("2", 80.0)])
    log = ListedSamples(
        [
            sample("known", rewards=[value("2", 50.0)]),
            sample("old", rewards=[value("1", 60.0)]),
            sample("of ids", prompt=None, rewards=[value("2", 70.0)]),
            sample("in a mix", rewards=[mix]),
            sample("never"),
        ]
    )
    reward = BatchedReward(CallableReward("length", "2", length))
    calibrators = ReferenceCalibrators(MemoryCalibratorStore(), log)
    found = await get(calibrators, scripted_draw([]), reward=reward, size=5)
    assert [row[0] for row in found.rows] == [50.0, 3.0, 6.0, 80.0, 5.0]
    assert scored == ["old", "of ids", "never"]


async def test_a_log_that_cannot_be_read_only_costs_the_draw(
    scripted_draw: Any, caplog: pytest.LogCaptureFixture
) -> None:
    log = ListedSamples([sample("a")], StorageError("the disk is gone"))
    draw = scripted_draw(list(TEXTS))
    assert (await get(ReferenceCalibrators(MemoryCalibratorStore(), log), draw, size=2)).size == 2
    assert draw.asked == [2]
    assert "the disk is gone" in caplog.text


async def test_a_mix_keeps_the_scores_of_its_parts_rollout_by_rollout(scripted_draw: Any) -> None:
    shout = BatchedReward(CallableReward("shout", "3", lambda inputs: [item.output.count("!") for item in inputs]))
    reward = ResolvedReward("mix", "1", (length_reward(), shout), "min", (0.5, 0.5))
    calibrators = ReferenceCalibrators(MemoryCalibratorStore())
    found = await calibrators.get(
        prompt="p", prompt_token_ids=[1], reward=reward, draw_reference=scripted_draw(["a!!", "bb"]), size=2
    )
    assert found == ReferenceScores(((3.0, 2.0), (2.0, 0.0)), "base", "length@1\nshout@3")
