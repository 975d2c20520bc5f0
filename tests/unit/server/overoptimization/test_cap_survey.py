"""Measuring a cap from a log."""

from collections.abc import AsyncIterator, Sequence

import pytest

from trimtab_adapters.contract.errors import ConflictError, InvalidRequestError, NotFoundError, RewardError
from trimtab_adapters.contract.records import RewardValue, Rollout
from trimtab_adapters.contract.rewards import RewardInput
from trimtab_adapters.contract.rollout_filter import RolloutFilter
from trimtab_server.overoptimization.cap_survey import CapSurvey
from trimtab_server.overoptimization.selection_caps import MemorySelectionCapStore, SelectionCaps
from turning_log import WordReward, rollout, turning_rollouts

pytestmark = pytest.mark.anyio


class Log:
    """A rollout log in memory."""

    def __init__(self, rollouts: Sequence[Rollout]) -> None:
        self.rollouts = rollouts
        self.asked: list[RolloutFilter] = []
        self.num_flushes = 0

    async def read(self, where: RolloutFilter) -> AsyncIterator[Rollout]:
        self.asked.append(where)
        for one in self.rollouts:
            yield one

    async def flush(self) -> None:
        self.num_flushes += 1


class Rewards:
    """The two words of an output."""

    def __init__(self) -> None:
        self.proxy, self.gold = WordReward("proxy", 0), WordReward("gold", 1)

    async def batched(self, name: str) -> WordReward:
        if name not in ("proxy", "gold"):
            raise NotFoundError(f"the reward {name!r} does not exist")
        return self.proxy if name == "proxy" else self.gold


class Bench:
    def __init__(self, rollouts: Sequence[Rollout]) -> None:
        self.log, self.rewards = Log(rollouts), Rewards()
        self.caps = SelectionCaps(MemorySelectionCapStore())
        self.survey = CapSurvey(self.log, self.log.flush, self.rewards, self.caps, "base", clock=lambda: 5.0)


async def test_a_turning_log_gets_a_cap_that_requests_are_warned_of() -> None:
    bench = Bench(turning_rollouts(40, 16))
    cap = await bench.survey.measure("proxy", "gold", route="nice", since=3.0, limit=900)
    assert bench.log.asked == [RolloutFilter(route="nice", since=3.0, limit=900)]
    assert bench.log.num_flushes == 1
    assert (cap.proxy, cap.gold, cap.base_model, cap.created_at) == ("proxy@1", "gold@1", "base", 5.0)
    assert (cap.num_prompts, cap.num_samples, len(cap.curve), cap.route) == (40, 640, 16, "nice")
    assert cap.verdict == "cap"
    assert (cap.num_rollouts, cap.left_out) == (640, {})
    assert await bench.survey.list() == [cap]
    assert await bench.caps.warning("proxy@1", "base", 16) is not None
    # The other way around, gold says nothing bad about what it is chosen by itself.
    assert await bench.caps.warning("gold@1", "base", 16) is None


async def test_rewards_of_the_log_are_used_at_their_version_only() -> None:
    known = [
        RewardValue(name="proxy", version="1", raw=1.0),
        RewardValue(name="gold", version="0", raw=99.0),
    ]
    rollouts = [one.model_copy(update={"rewards": known}) for one in turning_rollouts(20, 4)]
    bench = Bench(rollouts)
    cap = await bench.survey.measure("proxy", "gold")
    assert (bench.rewards.proxy.num_scored, bench.rewards.gold.num_scored) == (0, 80)
    # All tie in the proxy: the best of n is any of them.
    assert [point.gain for point in cap.curve] == pytest.approx([0.0] * 4, abs=1e-12)
    assert abs(cap.curve[0].gold) < 1


async def test_only_pools_that_reach_the_largest_n_are_scored() -> None:
    small = [rollout(f"s{i}", 100 + i // 4, output_text="1 1") for i in range(4 * 10)]
    bench = Bench([*turning_rollouts(20, 8), *small, *turning_rollouts(1, 3, seed=9)])
    cap = await bench.survey.measure("proxy", "gold")
    # 30 prompts are of use, 20 of them reach 8; prompt 0 has three more samples of the same pool.
    assert (cap.num_prompts, len(cap.curve), cap.num_samples) == (20, 8, 163)
    assert bench.rewards.gold.num_scored == 163
    assert cap.num_rollouts == 203
    assert cap.left_out == {"of pools with fewer than 8 samples": 40}


async def test_pools_of_one_prompt_are_not_added_up_to_a_larger_one() -> None:
    # Two settings with 4 samples each: n reaches 4, not 8.
    warm = {"temperature": 1.5, "max_tokens": 8}
    rollouts = turning_rollouts(20, 4)
    others = [one.model_copy(update={"id": f"w{one.id}", "sampling": warm}) for one in rollouts]
    cap = await Bench([*rollouts, *others]).survey.measure("proxy", "gold")
    assert (cap.num_prompts, len(cap.curve), cap.num_samples) == (20, 4, 160)


async def test_equal_outputs_are_scored_once() -> None:
    rollouts = [rollout(f"{p}-{i}", p, output_text=f"{i % 2} {i % 2}") for p in range(20) for i in range(4)]
    bench = Bench(rollouts)
    await bench.survey.measure("proxy", "gold")
    assert bench.rewards.proxy.num_scored == 40


async def test_too_little_data_says_what_was_read_and_left_out() -> None:
    rollouts = [
        *turning_rollouts(3, 4),
        rollout("a").model_copy(update={"prompt": None}),
        rollout("b", base_model="other"),
        rollout("c", base_model="other"),
    ]
    bench = Bench(rollouts)
    with pytest.raises(ConflictError) as caught:
        await bench.survey.measure("proxy", "gold")
    assert caught.value.code == "too_little_data"
    assert "the log has 3 such prompts" in caught.value.message
    assert (
        "(15 rollouts were read, of these left out: 2 of another base model, 1 without the text of the prompt)"
        in caught.value.message
    )
    assert await bench.survey.list() == []
    assert bench.rewards.proxy.num_scored == 0


async def test_a_reward_that_fails_is_an_error_and_nothing_is_stored() -> None:
    bench = Bench(turning_rollouts(20, 4))

    async def fail(inputs: Sequence[RewardInput]) -> list[float]:
        raise RewardError("the judge is away")

    bench.rewards.gold.score = fail  # type: ignore[method-assign]
    with pytest.raises(RewardError, match="the judge is away"):
        await bench.survey.measure("proxy", "gold")
    assert await bench.survey.list() == []


async def test_names_that_make_no_pair_are_refused_before_the_log_is_read() -> None:
    bench = Bench([])
    with pytest.raises(InvalidRequestError, match="two different"):
        await bench.survey.measure("gold", "gold")
    for proxy, gold in (("nobody", "gold"), ("proxy", "nobody")):
        with pytest.raises(NotFoundError, match="nobody"):
            await bench.survey.measure(proxy, gold)
    assert bench.log.asked == []
