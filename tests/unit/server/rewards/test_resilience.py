"""Retries, the circuit breaker, time limits, the cache and versions around any reward."""

import asyncio
import threading
import time
from collections.abc import Sequence

import pytest
from prometheus_client import CollectorRegistry
from typing_extensions import override

from trimtab_adapters.contract.errors import RewardChangedError, RewardError, RewardUnavailableError
from trimtab_adapters.contract.rewards import RewardInput
from trimtab_server.reward_metrics import RewardMetrics
from trimtab_server.rewards import attempts
from trimtab_server.rewards.batching import BatchedReward
from trimtab_server.rewards.limits import RewardLimits
from trimtab_server.rewards.pinned import PinnedReward
from trimtab_server.rewards.score_cache import ScoreCache

pytestmark = pytest.mark.anyio


class Lengths:
    """An awaited reward that gives the length of each output, after the errors it was told to raise."""

    name = "length"

    def __init__(self, *errors: Exception, version: str = "1") -> None:
        self.errors = list(errors)
        self.version = version
        self.batches: list[list[str]] = []
        self.num_running = 0
        self.most_running = 0
        self.pause_s = 0.0

    async def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        self.batches.append([item.output for item in inputs])
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            await asyncio.sleep(self.pause_s)
        finally:
            self.num_running -= 1
        if self.errors:
            raise self.errors.pop(0)
        return [float(len(item.output)) for item in inputs]


class Stuck:
    """A reward in a thread that waits for its gate."""

    name, version = "stuck", "1"

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.num_calls = 0
        self.most_at_once = 0
        self.num_inside = 0

    def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        self.num_calls += 1
        self.num_inside += 1
        self.most_at_once = max(self.most_at_once, self.num_inside)
        assert self.gate.wait(30)
        self.num_inside -= 1
        return [0.0] * len(inputs)


def inputs(*outputs: str) -> list[RewardInput]:
    return [RewardInput(prompt="p", output=output) for output in outputs]


def away(retry_after_s: float | None = None) -> RewardUnavailableError:
    return RewardUnavailableError("the server is away", retry_after_s=retry_after_s)


@pytest.fixture(autouse=True)
def quick_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "_FIRST_BACKOFF_S", 0.001)
    monkeypatch.setattr(attempts, "_JITTER_S", 0.0)


async def test_what_may_pass_is_tried_again() -> None:
    model = Lengths(away(), away())
    assert await BatchedReward(model, RewardLimits(max_retries=2)).score(inputs("abc")) == [3.0]
    assert len(model.batches) == 3


async def test_the_last_error_is_the_callers_when_retries_are_used_up() -> None:
    model = Lengths(*(away() for _ in range(3)))
    with pytest.raises(RewardUnavailableError, match="the server is away"):
        await BatchedReward(model, RewardLimits(max_retries=1)).score(inputs("abc"))
    assert len(model.batches) == 2


async def test_a_reward_that_failed_for_good_is_not_tried_again() -> None:
    model = Lengths(RewardError("no such label"))
    with pytest.raises(RewardError, match="no such label"):
        await BatchedReward(model).score(inputs("abc"))
    assert len(model.batches) == 1


async def test_what_the_gateway_must_not_try_again_is_left_to_the_caller() -> None:
    model = Lengths(RewardUnavailableError("ask again", is_retriable=False))
    with pytest.raises(RewardUnavailableError, match="ask again"):
        await BatchedReward(model).score(inputs("abc"))
    assert len(model.batches) == 1


async def test_the_pause_that_a_server_asks_for_is_kept() -> None:
    reward = BatchedReward(Lengths(away(retry_after_s=0.2)))
    started = time.monotonic()
    assert await reward.score(inputs("abc")) == [3.0]
    assert time.monotonic() - started >= 0.2


async def test_a_pause_longer_than_the_gateway_waits_is_passed_on_to_the_caller() -> None:
    model = Lengths(away(retry_after_s=attempts.MAX_BACKOFF_S + 1))
    with pytest.raises(RewardUnavailableError) as caught:
        await BatchedReward(model).score(inputs("abc"))
    assert caught.value.retry_after_s == attempts.MAX_BACKOFF_S + 1
    assert len(model.batches) == 1


async def test_an_attempt_that_takes_too_long_is_called_off_and_tried_again() -> None:
    model = Lengths()
    model.pause_s = 5.0
    with pytest.raises(RewardUnavailableError, match=r"'length' did not answer within 0.01 s"):
        await BatchedReward(model, RewardLimits(timeout_s=0.01, max_retries=1)).score(inputs("abc"))
    assert (len(model.batches), model.num_running) == (2, 0)


async def test_a_timeout_of_the_rewards_own_is_not_taken_for_ours() -> None:
    with pytest.raises(RewardError, match="'length' raised TimeoutError") as caught:
        await BatchedReward(Lengths(TimeoutError())).score(inputs("abc"))
    assert type(caught.value) is RewardError


async def test_the_deadline_covers_all_attempts_and_pauses() -> None:
    model = Lengths(*(away(retry_after_s=1.0) for _ in range(9)))
    started = time.monotonic()
    with pytest.raises(RewardUnavailableError, match=r"'length' did not answer within 0.05 s"):
        await BatchedReward(model, RewardLimits(max_retries=9, deadline_s=0.05)).score(inputs("abc"))
    assert time.monotonic() - started < 1.0


async def test_a_hung_thread_is_not_joined_by_a_second_one() -> None:
    model = Stuck()
    registry = CollectorRegistry()
    limits = RewardLimits(timeout_s=0.05, max_retries=3, cache_size=0, breaker_threshold=100)
    reward = BatchedReward(model, limits, RewardMetrics(registry))
    try:
        for _ in range(3):
            with pytest.raises(RewardUnavailableError, match="did not answer within"):
                await reward.score(inputs("a"))
        assert model.num_calls == 1
        # Waiting for the same thread again would be no other attempt.
        assert registry.get_sample_value("trimtab:reward_attempts_total", {"reward": "stuck"}) == 3
    finally:
        model.gate.set()
    assert await reward.score(inputs("a")) == [0.0]  # It is used again as soon as it is free.
    assert model.most_at_once == 1


async def test_an_open_breaker_answers_at_once_with_since_when_and_until_when() -> None:
    model = Lengths(*(away() for _ in range(3)))
    reward = BatchedReward(model, RewardLimits(max_retries=0, breaker_threshold=3, breaker_cooldown_s=100.0))
    for _ in range(3):
        assert reward.state.breaker.state == "closed"
        with pytest.raises(RewardUnavailableError, match="the server is away"):
            await reward.score(inputs("abc"))
    with pytest.raises(RewardUnavailableError) as caught:
        await reward.score(inputs("abc"))
    assert "not asked since 0 s ago, because 3 attempts in a row got no answer" in caught.value.message
    assert "it is tried again in 100 s" in caught.value.message
    assert caught.value.retry_after_s == pytest.approx(100.0, abs=5.0)
    assert len(model.batches) == 3
    breaker = reward.state.breaker
    assert breaker.state == "open"
    assert breaker.opened_at == pytest.approx(time.time(), abs=5.0)
    assert breaker.retry_at == pytest.approx((breaker.opened_at or 0.0) + 100.0)


async def test_an_open_breaker_answers_at_once_though_the_queue_is_held_up() -> None:
    reward = BatchedReward(Lengths(away(retry_after_s=2.0)), RewardLimits(max_concurrency=1, breaker_threshold=1))
    waiting = asyncio.create_task(reward.score(inputs("first")))
    await asyncio.sleep(0.05)  # Its attempt has failed, and it pauses before the next one.
    with pytest.raises(RewardUnavailableError, match="is not asked"):
        await asyncio.wait_for(reward.score(inputs("second")), 0.5)
    waiting.cancel()


async def test_a_breaker_that_opens_between_attempts_ends_them() -> None:
    model = Lengths(*(away() for _ in range(9)))
    with pytest.raises(RewardUnavailableError, match="2 attempts in a row"):
        await BatchedReward(model, RewardLimits(max_retries=9, breaker_threshold=2)).score(inputs("abc"))
    assert len(model.batches) == 2


async def test_one_attempt_after_the_pause_decides_whether_the_breaker_closes() -> None:
    model = Lengths(away(), away())
    reward = BatchedReward(model, RewardLimits(max_retries=0, breaker_threshold=1, breaker_cooldown_s=0.05))
    for num_attempts in (1, 2):
        with pytest.raises(RewardUnavailableError, match="the server is away"):
            await reward.score(inputs("abc"))
        with pytest.raises(RewardUnavailableError, match="is not asked"):
            await reward.score(inputs("abc"))
        assert len(model.batches) == num_attempts
        await asyncio.sleep(0.06)
    assert await reward.score(inputs("abc")) == [3.0]
    assert reward.state.breaker.state == "closed"


async def test_only_one_batch_tries_a_reward_that_may_be_back() -> None:
    model = Lengths(away())
    limits = RewardLimits(max_retries=0, breaker_threshold=1, breaker_cooldown_s=0.02, max_batch_size=1, cache_size=0)
    reward = BatchedReward(model, limits)
    with pytest.raises(RewardUnavailableError):
        await reward.score(inputs("abc"))
    await asyncio.sleep(0.03)
    model.pause_s = 0.05
    found = await asyncio.gather(*(reward.score(inputs("x" * i)) for i in range(5)), return_exceptions=True)
    assert found[0] == [0.0]
    assert all("it is being tried again now" in str(error) for error in found[1:])
    assert len(model.batches) == 2


async def test_a_batch_of_several_callers_is_not_taken_apart_because_the_reward_is_away() -> None:
    model = Lengths()
    model.pause_s = 0.02
    reward = BatchedReward(model, RewardLimits(max_retries=0, max_concurrency=1))
    first = asyncio.create_task(reward.score(inputs("first")))
    await asyncio.sleep(0.01)
    calls = [asyncio.create_task(reward.score(inputs("x" * i))) for i in range(1, 4)]
    await first
    model.errors = [away()]
    found = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(error) for error in found] == [RewardUnavailableError] * 3
    assert model.batches == [["first"], ["x", "xx", "xxx"]]


async def test_bad_content_does_not_open_the_breaker() -> None:
    model = Lengths(*(RewardError("bad text") for _ in range(9)))
    reward = BatchedReward(model, RewardLimits(breaker_threshold=2))
    for _ in range(5):
        with pytest.raises(RewardError, match="bad text"):
            await reward.score(inputs("abc"))
    assert reward.state.breaker.state == "closed"


async def test_known_scores_are_given_while_the_breaker_is_open() -> None:
    model = Lengths()
    reward = BatchedReward(model, RewardLimits(max_retries=0, breaker_threshold=1))
    await reward.score(inputs("known"))
    model.errors = [away()]
    with pytest.raises(RewardUnavailableError):
        await reward.score(inputs("new"))
    assert await reward.score(inputs("known")) == [5.0]


async def test_a_score_that_is_known_is_not_asked_for_again() -> None:
    model = Lengths()
    reward = BatchedReward(model)
    assert await reward.score(inputs("a", "bb")) == [1.0, 2.0]
    assert await reward.score(inputs("ccc", "bb", "a", "ccc")) == [3.0, 2.0, 1.0, 3.0]
    assert model.batches == [["a", "bb"], ["ccc"]]
    assert (reward.state.num_cached, reward.state.num_cache_hits) == (3, 2)


async def test_the_same_output_of_another_prompt_is_another_score() -> None:
    model = Lengths()
    reward = BatchedReward(model)
    for prompt in ("p", "q"):
        await reward.score([RewardInput(prompt, "a")])
    assert len(model.batches) == 2


async def test_without_a_cache_everything_is_asked_for() -> None:
    model = Lengths()
    reward = BatchedReward(model, RewardLimits(cache_size=0))
    for _ in range(2):
        await reward.score(inputs("a"))
    assert len(model.batches) == 2


def test_the_cache_is_bounded_in_number_and_in_time() -> None:
    cache = ScoreCache(max_size=2, ttl_s=0.05)
    one, two, three = inputs("1", "2", "3")
    cache.keep("v", {one: 1.0, two: 2.0, three: 3.0})
    assert len(cache) == 2
    assert cache.find("v", [one, two, three]) == {two: 2.0, three: 3.0}
    assert cache.find("w", [two]) == {}
    time.sleep(0.06)
    assert cache.find("v", [two, three]) == {}


def test_texts_cannot_be_shifted_between_the_parts_of_a_cache_key() -> None:
    cache = ScoreCache(max_size=10, ttl_s=60.0)
    cache.keep("v", {RewardInput("ab", "c"): 1.0, RewardInput("\ud83d", ""): 0.0})
    assert cache.find("v", [RewardInput("a", "bc")]) == {}
    assert cache.find("va", [RewardInput("b", "c")]) == {}
    assert cache.find("v", [RewardInput("\ud83d", "")]) == {RewardInput("\ud83d", ""): 0.0}


async def test_a_large_call_of_an_awaited_reward_is_split_and_runs_side_by_side() -> None:
    model = Lengths()
    model.pause_s = 0.02
    reward = BatchedReward(model, RewardLimits(max_batch_size=3, max_concurrency=2))
    assert await reward.score(inputs(*("x" * i for i in range(10)))) == [float(i) for i in range(10)]
    assert sorted(map(len, model.batches)) == [1, 3, 3, 3]
    assert model.most_running == 2


async def test_an_error_in_a_split_call_says_which_outputs_it_is_of_and_ends_the_rest() -> None:
    class Picky(Lengths):
        @override
        async def score(self, inputs: Sequence[RewardInput]) -> list[float]:
            if inputs[0].output == "bad":
                raise RewardError("no number for output 1 of 1")
            return await super().score(inputs)

    model = Picky()
    model.pause_s = 0.05
    reward = BatchedReward(model, RewardLimits(max_batch_size=1, max_concurrency=2))
    with pytest.raises(RewardError, match=r"output 1 of 1 \(this is of outputs 2 of 9\)"):
        await reward.score(inputs("a", "bad", *("c" * i for i in range(1, 8))))
    await asyncio.sleep(0.2)
    assert len(model.batches) <= 2  # The one beside it, and the one that took its place; not all nine.


async def test_a_bad_output_among_known_ones_is_named_by_its_own_place() -> None:
    class Picky:
        name, version = "picky", "1"

        def score(self, inputs: Sequence[RewardInput]) -> list[float]:
            return [float("nan") if item.output == "bad" else 1.0 for item in inputs]

    reward = BatchedReward(Picky())
    await reward.score(inputs("a", "b"))
    with pytest.raises(RewardError, match="nan for output 3 of 3"):
        await reward.score(inputs("a", "b", "bad"))


class Upgrading(Lengths):
    """Answers from version 2 when it was asked as version 1, as a server does that was replaced meanwhile."""

    @override
    async def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        scores = await super().score(inputs)
        if self.version == "old":
            self.version = "new"
            raise RewardChangedError("it changed")
        return scores


async def test_a_call_during_which_the_version_changes_is_scored_again_as_a_whole() -> None:
    model = Upgrading()
    reward = BatchedReward(model)
    await reward.score(inputs("known"))
    model.version = "1"
    await reward.score(inputs("known"))
    assert (await reward.scored(inputs("known"))).version == "1"
    model.version = "old"
    scored = await reward.scored(inputs("known", "more"))
    assert (scored.version, scored.scores) == ("new", [5.0, 4.0])


async def test_known_scores_of_an_old_version_are_not_mixed_with_new_ones() -> None:
    model = Upgrading(version="old")
    reward = BatchedReward(model)
    reward._cache.keep("old", {inputs("known")[0]: -1.0})
    scored = await reward.scored(inputs("known", "more"))
    assert (scored.version, scored.scores) == ("new", [5.0, 4.0])


async def test_pieces_of_one_call_that_are_of_two_versions_are_an_error() -> None:
    class Upgraded(Lengths):
        @override
        async def score(self, inputs: Sequence[RewardInput]) -> list[float]:
            scores = await super().score(inputs)
            self.version = "2"  # Seen by another call between this piece and the next.
            return scores

    with pytest.raises(RewardChangedError, match="changed its version while outputs were scored"):
        await BatchedReward(Upgraded(), RewardLimits(max_batch_size=1, max_concurrency=1)).score(inputs("a", "b"))


async def test_a_version_that_never_stands_still_is_an_error() -> None:
    class Restless(Lengths):
        @override
        async def score(self, inputs: Sequence[RewardInput]) -> list[float]:
            self.version += "+"
            raise RewardChangedError("it changed")

    with pytest.raises(RewardChangedError):
        await BatchedReward(Restless()).score(inputs("a"))


async def test_a_pinned_reward_gives_scores_of_its_version_or_none() -> None:
    model = Upgrading(version="old")
    reward = BatchedReward(model)
    pinned = PinnedReward(reward)
    with pytest.raises(RewardChangedError, match="from version old to new during this request; ask again"):
        await pinned.score(inputs("a"))
    assert (pinned.name, pinned.version) == ("length", "old")
    assert await PinnedReward(reward).score(inputs("a")) == [1.0]


async def test_metrics_count_attempts_failures_scores_and_cache_hits_by_reward() -> None:
    registry = CollectorRegistry()
    reward = BatchedReward(Lengths(away(), RewardError("no")), observer=RewardMetrics(registry))

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"trimtab:{name}", {"reward": "length", **labels})

    with pytest.raises(RewardError, match="no"):
        await reward.score(inputs("a"))
    await reward.score(inputs("a", "b"))
    await reward.score(inputs("b", "c"))
    assert value("reward_attempts_total") == 4
    assert value("reward_errors_total", code="reward_unavailable") == 1
    assert value("reward_errors_total", code="reward_failed") == 1
    assert value("reward_scores_total") == 4
    assert value("reward_cache_hits_total") == 1
    assert value("reward_seconds_count") == 2


async def test_code_that_cancels_itself_is_an_error_and_the_queue_goes_on() -> None:
    model = Lengths()
    model.errors = [asyncio.CancelledError()]  # type: ignore[list-item]
    reward = BatchedReward(model)
    with pytest.raises(RewardError, match="cancelled by code of its own"):
        await reward.score(inputs("a"))
    assert await reward.score(inputs("a")) == [1.0]
