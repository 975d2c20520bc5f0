"""Finding rewards by name."""

import asyncio
import logging
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import EntryPoint

import pytest
from typing_extensions import override

from trimtab_adapters.contract.errors import InvalidRequestError, NotFoundError, RewardError, StorageError
from trimtab_adapters.contract.rewards import RewardInput, RewardModel, RewardSpec
from trimtab_server.rewards.callable import ENTRY_POINT_GROUP
from trimtab_server.rewards.registry import MemoryRewardSpecs, RewardRegistry

pytestmark = pytest.mark.anyio


class Constant:
    def __init__(self, spec: RewardSpec) -> None:
        self.name = spec.name
        self.version = spec.target
        self.value = float(str(spec.options.get("value", 0.0)))

    def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        return [self.value] * len(inputs)


class CountingBuilder:
    def __init__(self) -> None:
        self.built: list[str] = []

    def __call__(self, spec: RewardSpec) -> RewardModel:
        self.built.append(spec.name)
        if spec.target == "/secret/path":
            raise InvalidRequestError("there is no directory '/secret/path'", param="target")
        return Constant(spec)


def spec(name: str, target: str = "v1", **options: str | float | bool) -> RewardSpec:
    return RewardSpec(name=name, kind="hf_classifier", target=target, options=options)


def publish(**values: str) -> Callable[[], Iterable[EntryPoint]]:
    return lambda: [EntryPoint(name=name, value=value, group=ENTRY_POINT_GROUP) for name, value in values.items()]


@pytest.fixture
def builder() -> CountingBuilder:
    return CountingBuilder()


@pytest.fixture
def registry(builder: CountingBuilder) -> RewardRegistry:
    return RewardRegistry(
        [spec("one"), spec("two"), spec("broken", "/secret/path")],
        entry_points=publish(installed=f"{__name__}:missing"),
        builders={"hf_classifier": builder},
    )


async def test_a_reward_is_built_when_first_asked_for_and_once(
    registry: RewardRegistry, builder: CountingBuilder
) -> None:
    assert builder.built == []
    rewards = await asyncio.gather(*(registry.batched("one") for _ in range(20)))
    assert builder.built == ["one"]
    assert len({id(reward) for reward in rewards}) == 1
    assert await registry.get("one") is rewards[0].model


async def test_an_unknown_name_is_not_found_with_the_known_names(registry: RewardRegistry) -> None:
    with pytest.raises(
        NotFoundError, match="'no' does not exist; known rewards: broken, installed, one, two"
    ) as caught:
        await registry.get("no")
    assert (caught.value.status, caught.value.param) == (404, "reward")
    with pytest.raises(NotFoundError, match="known rewards: none"):
        await RewardRegistry(entry_points=publish()).get("no")


async def test_an_entry_point_needs_no_registration() -> None:
    registry = RewardRegistry(entry_points=publish(root="statistics:mean"))
    assert [s.name for s in await registry.list()] == ["root"]
    reward = await registry.get("root")
    assert reward.name == "root"
    with pytest.raises(RewardError):  # Loaded and called: a mean takes no texts.
        reward.score([RewardInput("p", "o")])


async def test_a_registered_reward_comes_before_an_entry_point_of_its_name(builder: CountingBuilder) -> None:
    registry = RewardRegistry(
        [spec("same", value=7.0)], entry_points=publish(same="statistics:mean"), builders={"hf_classifier": builder}
    )
    assert [s.kind for s in await registry.list()] == ["hf_classifier"]
    assert (await registry.get("same")).score([RewardInput("p", "o")]) == [7.0]


async def test_rewards_are_listed_by_name_without_being_built(
    registry: RewardRegistry, builder: CountingBuilder
) -> None:
    assert [s.name for s in await registry.list()] == ["broken", "installed", "one", "two"]
    assert builder.built == []


async def test_an_added_reward_is_built_stored_and_served(builder: CountingBuilder) -> None:
    specs = MemoryRewardSpecs()
    registry = RewardRegistry(specs, entry_points=publish(), builders={"hf_classifier": builder})
    assert await registry.add(spec("new", value=1.0)) == "v1"
    assert await specs.list() == (spec("new", value=1.0),)
    assert (await registry.batched("new")).version == "v1"
    assert builder.built == ["new"]


async def test_a_reward_that_cannot_be_built_is_refused_and_the_old_one_stays(registry: RewardRegistry) -> None:
    before = await registry.get("one")
    with pytest.raises(InvalidRequestError, match="/secret/path"):
        await registry.add(spec("one", "/secret/path"))
    assert await registry.get("one") is before


async def test_a_reward_that_cannot_be_stored_is_not_served() -> None:
    class Full(MemoryRewardSpecs):
        @override
        async def put(self, spec: RewardSpec) -> None:
            raise StorageError("the disk is full")

    registry = RewardRegistry(Full(), entry_points=publish(), builders={"hf_classifier": CountingBuilder()})
    with pytest.raises(StorageError):
        await registry.add(spec("new"))
    with pytest.raises(NotFoundError):
        await registry.get("new")


async def test_a_spec_that_another_process_replaced_is_seen(builder: CountingBuilder) -> None:
    specs = MemoryRewardSpecs([spec("r", "v1")])
    registry = RewardRegistry(specs, entry_points=publish(), builders={"hf_classifier": builder})
    assert (await registry.get("r")).version == "v1"
    await specs.put(spec("r", "v2"))
    assert (await registry.get("r")).version == "v2"


async def test_a_caller_is_not_told_the_paths_of_a_reward_that_cannot_be_loaded(
    registry: RewardRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(RewardError) as caught:
        await registry.get("broken")
    assert "'broken'" in caught.value.message
    assert "/secret/path" not in caught.value.message
    assert "/secret/path" in caplog.text


async def test_a_kind_without_a_builder_is_refused() -> None:
    registry = RewardRegistry(entry_points=publish())
    odd = spec("odd").model_copy(update={"kind": "crystal_ball"})
    with pytest.raises(InvalidRequestError, match=r"'crystal_ball'.*known kinds: callable, hf_classifier"):
        await registry.add(odd)


async def test_an_unknown_entry_point_is_refused_when_it_is_registered() -> None:
    registry = RewardRegistry(entry_points=publish(known="statistics:mean"))
    with pytest.raises(InvalidRequestError, match=r"'no'.*known: known"):
        await registry.add(RewardSpec(name="r", kind="callable", target="no"))


async def test_an_entry_point_whose_name_no_request_can_carry_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert await RewardRegistry(entry_points=publish(**{"two words": "statistics:mean"})).list() == []
    assert "'two words'" in caplog.text


def test_importing_the_registry_and_the_selector_loads_no_torch() -> None:
    code = (
        "import sys, trimtab_server.rewards.registry, trimtab_server.decoding.strategies; "
        "sys.exit(', '.join(m for m in ('torch', 'transformers', 'vllm') if m in sys.modules) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
