"""Several rewards as one: what a mix resolves to, and what it may be made of."""

from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from trimtab_adapters.contract.errors import (
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    RewardChangedError,
    RewardError,
    RewardUnavailableError,
)
from trimtab_adapters.contract.rewards import RewardInput, RewardMix, RewardModel, RewardSpec
from trimtab_server.rewards import registry as registry_module
from trimtab_server.rewards.callable import ENTRY_POINT_GROUP
from trimtab_server.rewards.registry import MemoryRewardSpecs, RewardRegistry

pytestmark = pytest.mark.anyio

INPUTS = [RewardInput("p", "abc")]


class Constant:
    def __init__(self, spec: RewardSpec) -> None:
        self.name, self.version = spec.name, spec.target

    def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        return [1.0] * len(inputs)


class Builder:
    """Builds constants; raises what it was told to."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.num_built = 0
        self.last: Constant | None = None

    def __call__(self, spec: RewardSpec) -> RewardModel:
        self.num_built += 1
        if self.error is not None:
            raise self.error
        self.last = Constant(spec)
        return self.last


def plain(name: str, version: str = "1") -> RewardSpec:
    return RewardSpec(name=name, kind="hf_classifier", target=version)


def composite(name: str, combine: str = "mean", target: str = "", **weights: Any) -> RewardSpec:
    return RewardSpec(name=name, kind="composite", target=target, options={"combine": combine, "weights": weights})


def no_entry_points() -> Iterable[EntryPoint]:
    return ()


@pytest.fixture
def builder() -> Builder:
    return Builder()


@pytest.fixture
def make(builder: Builder) -> Callable[..., RewardRegistry]:
    def make(*specs: RewardSpec) -> RewardRegistry:
        return RewardRegistry(specs, entry_points=no_entry_points, builders={"hf_classifier": builder})

    return make


async def test_a_single_reward_is_its_own_part(make: Callable[..., RewardRegistry]) -> None:
    resolved = await make(plain("a", "7")).resolve("a")
    assert (resolved.name, resolved.version, resolved.combine, resolved.weights) == ("a", "7", None, (1.0,))
    assert [(part.name, part.version) for part in resolved.parts] == [("a", "7")]
    assert await resolved.parts[0].score(INPUTS) == [1.0]


async def test_a_mix_has_its_parts_with_weights_that_sum_to_one(make: Callable[..., RewardRegistry]) -> None:
    registry = make(plain("a"), plain("b"), composite("both", a=3.0, b=1.0))
    choices: list[tuple[str | RewardMix, str]] = [
        (RewardMix(weights={"a": 3.0, "b": 1.0}), "0.75*a+0.25*b"),
        ("both", "both"),
    ]
    for choice, name in choices:
        resolved = await registry.resolve(choice)
        assert (resolved.name, resolved.combine, resolved.weights) == (name, "mean", (0.75, 0.25))
        assert [part.name for part in resolved.parts] == ["a", "b"]


@pytest.mark.parametrize("combine", ["min", "product"])
async def test_weights_mean_nothing_to_the_other_combinations(
    make: Callable[..., RewardRegistry], combine: Any
) -> None:
    registry = make(plain("a"), plain("b"))
    one = await registry.resolve(RewardMix(combine=combine, weights={"a": 3.0, "b": 1.0}))
    other = await registry.resolve(RewardMix(combine=combine, weights={"a": 1.0, "b": 1.0}))
    assert one.weights == other.weights == (0.5, 0.5)
    assert (one.name, one.version) == (other.name, other.version) == (f"{combine}(a,b)", one.version)


async def test_the_version_of_a_mix_changes_with_anything_that_changes_scores(
    make: Callable[..., RewardRegistry],
) -> None:
    async def version(choice: Any, a: str = "1") -> str:
        return (await make(plain("a", a), plain("b"), composite("c", b=2.0, a=2.0)).resolve(choice)).version

    mix = RewardMix(weights={"a": 0.5, "b": 0.5})
    first = await version(mix)
    # Order, sum and name do not matter.
    assert await version(RewardMix(weights={"b": 7.0, "a": 7.0})) == await version("c") == first
    others = [
        await version(mix, a="2"),
        await version(RewardMix(weights={"a": 0.6, "b": 0.4})),
        await version(RewardMix(combine="min", weights=mix.weights)),
        await version(RewardMix(combine="product", weights=mix.weights)),
    ]
    assert len({first, *others}) == 5


async def test_a_mix_of_one_is_that_one(make: Callable[..., RewardRegistry]) -> None:
    resolved = await make(plain("a", "7")).resolve(RewardMix(weights={"a": 0.3}))
    assert (resolved.version, resolved.combine, resolved.weights) == ("7", None, (1.0,))


async def test_the_parts_of_a_mix_are_held_to_their_versions(
    make: Callable[..., RewardRegistry], builder: Builder
) -> None:
    resolved = await make(plain("a"), plain("b")).resolve(RewardMix(weights={"a": 1.0, "b": 1.0}))
    assert builder.last is not None
    builder.last.version = "2"
    assert await resolved.parts[0].score(INPUTS) == [1.0]
    with pytest.raises(RewardChangedError, match="'b' changed from version 1 to 2"):
        await resolved.parts[1].score(INPUTS)


async def test_an_unknown_part_is_not_found_with_the_known_names(make: Callable[..., RewardRegistry]) -> None:
    registry = make(plain("a"), composite("c", a=1.0, b=1.0))
    for choice in (RewardMix(weights={"a": 1.0, "b": 1.0}), "c"):
        with pytest.raises(NotFoundError, match="'b' does not exist; known rewards: a, c"):
            await registry.resolve(choice)


async def test_composites_are_not_nested(make: Callable[..., RewardRegistry]) -> None:
    registry = make(plain("a"), composite("inner", a=1.0))
    for call in (
        registry.resolve(RewardMix(weights={"a": 1.0, "inner": 1.0})),
        registry.add(composite("outer", a=1.0, inner=1.0)),
        registry.add(composite("self", a=1.0, self=1.0)),
    ):
        with pytest.raises(InvalidRequestError, match="composite"):
            await call
    with pytest.raises(ConflictError, match="a part of inner"):
        await registry.add(composite("a", a=1.0))
    assert [spec.name for spec in await registry.list()] == ["a", "inner"]


@pytest.mark.parametrize(
    ("spec", "param"),
    [
        (composite("c"), "options.weights"),
        (composite("c", a=0.0), "weights"),
        (composite("c", a=-1.0), "weights"),
        (composite("c", a="1"), "options.weights"),
        (composite("c", combine="max", a=1.0), "options.combine"),
        (composite("c", target="x", a=1.0), "target"),
        (
            RewardSpec(name="c", kind="composite", options={"weights": {"a": 1.0}, "timeout_s": 1.0}),
            "options.timeout_s",
        ),
    ],
)
async def test_a_bad_composite_is_refused_by_name(
    make: Callable[..., RewardRegistry], spec: RewardSpec, param: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await make(plain("a")).add(spec)
    assert str(caught.value.param).endswith(param)


async def test_a_composite_has_no_score_of_its_own(make: Callable[..., RewardRegistry]) -> None:
    registry = make(plain("a"), composite("c", a=1.0))
    with pytest.raises(InvalidRequestError, match="has no score for an output alone"):
        await registry.batched("c")
    report = await registry.report("c")
    assert (report.version, report.state, report.error) == ((await registry.resolve("c")).version, None, None)


async def test_a_reward_is_removed_unless_a_composite_or_package_needs_it(builder: Builder) -> None:
    registry = RewardRegistry(
        [plain("a"), plain("b"), composite("c", a=1.0)],
        entry_points=lambda: [EntryPoint(name="installed", value="math:fabs", group=ENTRY_POINT_GROUP)],
        builders={"hf_classifier": builder},
    )
    with pytest.raises(ConflictError, match="a part of c; remove them first"):
        await registry.remove("a")
    with pytest.raises(ConflictError, match="comes with an installed package"):
        await registry.remove("installed")
    with pytest.raises(NotFoundError):
        await registry.remove("nothing")
    for name in ("c", "a", "b"):
        await registry.remove(name)
    assert [spec.name for spec in await registry.list()] == ["installed"]
    with pytest.raises(NotFoundError):
        await registry.batched("b")


async def test_a_reward_whose_server_is_away_is_refused_with_the_reason_when_it_is_added(
    make: Callable[..., RewardRegistry], builder: Builder
) -> None:
    builder.error = RewardUnavailableError("the server of the reward 'a' cannot be reached")
    registry = make()
    with pytest.raises(InvalidRequestError, match="cannot be used: the server of the reward 'a' cannot be reached"):
        await registry.add(plain("a"))
    assert await registry.list() == []


async def test_a_reward_whose_server_is_away_may_come_back_and_is_not_asked_by_every_request(
    make: Callable[..., RewardRegistry], builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = make(plain("a"))
    builder.error = RewardUnavailableError("the server at 10.0.0.1 cannot be reached")
    for _ in range(3):
        with pytest.raises(
            RewardUnavailableError, match="cannot be loaded; the gateway's log has the reason"
        ) as caught:
            await registry.resolve("a")
        assert "10.0.0.1" not in caught.value.message
    assert builder.num_built == 1
    report = await registry.report("a")
    assert (report.version, report.error) == (None, caught.value.message)
    builder.error = None
    monkeypatch.setattr(registry_module, "_FAILURE_KEPT_S", 0.0)
    assert (await registry.resolve("a")).version == "1"


async def test_a_registration_that_another_process_mended_is_used_at_once(builder: Builder) -> None:
    specs = MemoryRewardSpecs([plain("a", "1")])
    registry = RewardRegistry(specs, entry_points=no_entry_points, builders={"hf_classifier": builder})
    builder.error = RewardError("no")
    with pytest.raises(RewardError):
        await registry.resolve("a")
    builder.error = None
    await specs.put(plain("a", "2"))
    assert (await registry.resolve("a")).version == "2"


async def test_a_reward_that_is_added_again_is_used_at_once_after_a_failure(
    make: Callable[..., RewardRegistry], builder: Builder
) -> None:
    registry = make(plain("a"))
    builder.error = RewardError("no")
    with pytest.raises(RewardError):
        await registry.resolve("a")
    builder.error = None
    await registry.add(plain("a"))
    assert (await registry.resolve("a")).version == "1"
