"""Concurrent score calls of one reward."""

import asyncio
import threading
from collections.abc import Callable, Sequence

import pytest

from trimtab_adapters.contract.errors import RewardError
from trimtab_adapters.contract.rewards import RewardInput
from trimtab_server.rewards.batching import BatchedReward
from trimtab_server.rewards.limits import RewardLimits

pytestmark = pytest.mark.anyio


class GatedReward:
    """Scores the length of the output. While its gate is closed the worker thread waits in the first batch."""

    name = "length"
    version = "1"

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.threads: set[int] = set()
        self.gate = threading.Event()
        self.started = threading.Event()
        self.on_score: Callable[[Sequence[RewardInput]], None] = lambda inputs: None

    def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        self.batches.append([item.output for item in inputs])
        self.threads.add(threading.get_ident())
        self.started.set()
        assert self.gate.wait(30)
        self.on_score(inputs)
        return [float(len(item.output)) for item in inputs]


def inputs(*outputs: str) -> list[RewardInput]:
    return [RewardInput(prompt="p", output=output) for output in outputs]


async def first_batch_runs(model: GatedReward, reward: BatchedReward) -> "asyncio.Task[list[float]]":
    """Start a call whose batch waits at the gate, so that what follows is queued."""
    task = asyncio.create_task(reward.score(inputs("first")))
    assert await asyncio.to_thread(model.started.wait, 30)
    return task


async def queued(reward: BatchedReward, *calls: Sequence[RewardInput]) -> "list[asyncio.Task[list[float]]]":
    tasks = [asyncio.create_task(reward.score(call)) for call in calls]
    await asyncio.sleep(0)  # Each task runs to its first wait and has put its call in the queue.
    return tasks


async def test_an_idle_reward_scores_at_once_and_off_the_event_loop() -> None:
    model = GatedReward()
    model.gate.set()
    assert await BatchedReward(model).score(inputs("a", "", "abc")) == [1.0, 0.0, 3.0]
    assert threading.get_ident() not in model.threads


async def test_calls_that_wait_share_one_batch_and_each_gets_its_own_scores() -> None:
    model = GatedReward()
    reward = BatchedReward(model)
    first = await first_batch_runs(model, reward)
    tasks = await queued(reward, *(inputs("x" * i, "y" * i) for i in range(1, 21)))
    model.gate.set()
    assert await asyncio.gather(*tasks) == [[float(i), float(i)] for i in range(1, 21)]
    assert await first == [5.0]
    assert [len(batch) for batch in model.batches] == [1, 40]


async def test_a_batch_keeps_to_its_size_and_one_large_call_is_not_split() -> None:
    model = GatedReward()
    reward = BatchedReward(model, RewardLimits(max_batch_size=4))
    first = await first_batch_runs(model, reward)
    tasks = await queued(
        reward, inputs("a", "b", "c"), inputs("d"), inputs("e"), inputs("f", "g", "h", "i", "j"), inputs("k")
    )
    model.gate.set()
    await asyncio.gather(first, *tasks)
    assert model.batches[1:] == [["a", "b", "c", "d"], ["e"], ["f", "g", "h", "i", "j"], ["k"]]


async def test_equal_inputs_of_a_batch_are_scored_once() -> None:
    model = GatedReward()
    model.gate.set()
    assert await BatchedReward(model).score(inputs("ab", "c", "ab")) == [2.0, 1.0, 2.0]
    assert model.batches == [["ab", "c"]]


async def test_a_bad_input_fails_only_the_call_that_sent_it() -> None:
    model = GatedReward()

    def refuse_bad(inputs: Sequence[RewardInput]) -> None:
        for i, item in enumerate(inputs, start=1):
            if item.output == "bad":
                raise RewardError(f"the reward 'length' raised ValueError for output {i} of {len(inputs)}")

    model.on_score = refuse_bad
    reward = BatchedReward(model)
    first = await first_batch_runs(model, reward)
    tasks = await queued(reward, inputs("a", "a"), inputs("b", "b", "bad"), inputs("c"))
    model.gate.set()
    good, bad, other = await asyncio.gather(*tasks, return_exceptions=True)
    assert good == [1.0, 1.0]
    assert other == [1.0]
    assert isinstance(bad, RewardError)
    assert "output 3 of 3" in bad.message  # The caller's own position, not the batch's.
    assert await first == [5.0]


async def test_a_single_call_that_fails_is_not_run_twice() -> None:
    model = GatedReward()
    model.gate.set()

    def fail(inputs: Sequence[RewardInput]) -> None:
        raise RewardError("no")

    model.on_score = fail
    with pytest.raises(RewardError, match="no"):
        await BatchedReward(model).score(inputs("a", "b"))
    assert len(model.batches) == 1


@pytest.mark.parametrize("error", [ZeroDivisionError("text"), SystemExit("text"), StopIteration("text")])
async def test_whatever_a_reward_raises_is_an_error_of_the_call_and_the_queue_goes_on(error: BaseException) -> None:
    model = GatedReward()
    model.gate.set()

    def fail(inputs: Sequence[RewardInput]) -> None:
        if inputs[0].output == "bad":
            raise error

    model.on_score = fail
    reward = BatchedReward(model)
    with pytest.raises(RewardError) as caught:
        await reward.score(inputs("bad"))
    assert caught.value.message == f"the reward 'length' raised {type(error).__name__}"
    assert await reward.score(inputs("ok")) == [2.0]


async def test_a_reward_that_returns_nan_or_too_little_is_an_error() -> None:
    class Odd:
        name, version = "odd", "1"

        def score(self, inputs: Sequence[RewardInput]) -> list[float]:
            return [float("nan")] if inputs[0].output == "nan" else []

    with pytest.raises(RewardError, match="returned nan for output 1 of 1"):
        await BatchedReward(Odd()).score(inputs("nan"))
    with pytest.raises(RewardError, match="returned 0 scores for 1 outputs"):
        await BatchedReward(Odd()).score(inputs("short"))


async def test_a_caller_who_leaves_is_not_scored_and_disturbs_no_one() -> None:
    model = GatedReward()
    reward = BatchedReward(model)
    first = await first_batch_runs(model, reward)
    gone, stays = await queued(reward, inputs("gone"), inputs("stays"))
    gone.cancel()
    first.cancel()
    await asyncio.wait([gone, first])
    model.gate.set()
    assert await stays == [5.0]
    assert model.batches == [["first"], ["stays"]]


async def test_a_reward_that_hangs_is_an_error_in_time() -> None:
    model = GatedReward()
    reward = BatchedReward(model, RewardLimits(deadline_s=0.01))
    with pytest.raises(RewardError, match=r"'length' did not answer within 0\.01 s"):
        await reward.score(inputs("a"))
    model.gate.set()


async def test_no_inputs_need_no_reward() -> None:
    model = GatedReward()
    assert await BatchedReward(model).score([]) == []
    assert model.batches == []
