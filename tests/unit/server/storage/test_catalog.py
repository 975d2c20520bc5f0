"""The catalog: what a model name means, and how adapters and routes change."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from trimtab_adapters.contract.errors import (
    ConflictError,
    EngineUnavailableError,
    InvalidRequestError,
    NotFoundError,
    WeightsError,
)
from trimtab_adapters.contract.params import (
    AdapterChoice,
    AdapterWeight,
    AlphaSchedule,
    PromptMessage,
    SteeringOptions,
    SteeringRequest,
)
from trimtab_adapters.store import VersionStore
from trimtab_server.storage.base import AdapterVersion, ResolvedModel
from trimtab_server.storage.catalog import SqlCatalog
from trimtab_server.storage.database import Database
from version_directories import make_model_directory

pytestmark = pytest.mark.anyio


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


class Workbench:
    """A catalog with its store, and a quick way to register versions."""

    def __init__(self, database: Database, directory: Path) -> None:
        self.database = database
        self.directory = directory
        self.store = VersionStore(directory / "store")
        self.clock = Clock()
        self.catalog = self.open()

    def open(self) -> SqlCatalog:
        """Another catalog over the same database, as after a restart."""
        return SqlCatalog(self.database, self.store, "base", clock=self.clock)

    async def register(self, name: str, weight: float, alpha: float | None = None) -> AdapterVersion:
        source = self.directory / f"{name}-{weight}"
        if not source.exists():
            make_model_directory(source, weight=weight)
        return await self.catalog.register(source, name=name, default_alpha=alpha)


@pytest.fixture
def bench(database: Database, tmp_path: Path) -> Workbench:
    return Workbench(database, tmp_path)


def steering(*choices: AdapterChoice) -> SteeringRequest:
    return SteeringRequest(adapters=list(choices))


async def test_the_base_models_name_is_unsteered(bench: Workbench) -> None:
    assert await bench.catalog.resolve("base", None) == ResolvedModel("base", "base", ())


async def test_an_unknown_model_is_not_found_in_openais_words(bench: Workbench) -> None:
    with pytest.raises(NotFoundError) as caught:
        await bench.catalog.resolve("gpt-9", None)
    assert caught.value.message == "The model `gpt-9` does not exist"
    assert (caught.value.param, caught.value.code, caught.value.status) == ("model", "model_not_found", 404)


async def test_a_route_gives_its_steering_best_of_and_reward(bench: Workbench) -> None:
    version = await bench.register("kind", 1.0)
    weight = AdapterWeight(name="kind", version=version.version, alpha=0.5)
    await bench.catalog.put_route("nice", [weight], best_of=4, reward="kindness")
    assert await bench.catalog.resolve("nice", None) == ResolvedModel("nice", "base", (weight,), 4, "kindness")


async def test_the_requests_steering_replaces_the_routes(bench: Workbench) -> None:
    first, second = await bench.register("kind", 1.0, alpha=0.25), await bench.register("kind", 2.0, alpha=0.75)
    await bench.catalog.activate("nice", "kind", first.version)
    newest = await bench.catalog.resolve("nice", steering(AdapterChoice(name="kind")))
    assert newest.steering == (AdapterWeight(name="kind", version=second.version, alpha=0.75),)
    exact = await bench.catalog.resolve("base", steering(AdapterChoice(name="kind", version=first.version, alpha=-1.0)))
    assert exact.steering == (AdapterWeight(name="kind", version=first.version, alpha=-1.0),)
    none = await bench.catalog.resolve("nice", steering())
    assert none.steering == ()


OPTIONS = SteeringOptions(
    schedule=AlphaSchedule(first=20, decay=0.95),
    plausibility=0.1,
    negative_prompt=[PromptMessage(role="user", content="Be rude. \x00\ud800")],
    guidance_scale=2.0,
)


async def test_a_routes_options_survive_activation_rollback_and_restart(bench: Workbench) -> None:
    await bench.register("kind", 1.0)
    await bench.catalog.put_route("nice", [], options=OPTIONS)
    activated = await bench.catalog.activate("nice", "kind")
    assert (activated.options, len(activated.steering)) == (OPTIONS, 1)
    assert (await bench.catalog.put_route("nice", [])).options == SteeringOptions()
    assert (await bench.catalog.rollback("nice", 2)).options == OPTIONS
    again = bench.open()
    await again.load()
    assert (await again.resolve("nice", None)).options == OPTIONS
    assert [revision.options == OPTIONS for revision in await again.history("nice")] == [True, True, False, True]


async def test_options_of_a_request_replace_the_routes_one_by_one(bench: Workbench) -> None:
    await bench.catalog.put_route("nice", [], options=OPTIONS)

    async def options(**fields: Any) -> SteeringOptions:
        return (await bench.catalog.resolve("nice", SteeringRequest(**fields))).options

    assert await options(adapters=[]) == OPTIONS
    assert await options(plausibility=0.5) == OPTIONS.model_copy(update={"plausibility": 0.5})
    assert await options(schedule=None) == OPTIONS.model_copy(update={"schedule": None})
    assert await options(negative_prompt="Rude") == OPTIONS.model_copy(update={"negative_prompt": "Rude"})
    without = OPTIONS.model_copy(update={"negative_prompt": None, "guidance_scale": None})
    assert await options(negative_prompt=None) == without
    with pytest.raises(InvalidRequestError) as caught:
        await options(negative_prompt=None, guidance_scale=2.0)
    assert caught.value.param == "steering.guidance_scale"
    with pytest.raises(InvalidRequestError):
        await bench.catalog.resolve("base", SteeringRequest(guidance_scale=2.0))


async def test_revisions_from_before_there_were_options_have_none(bench: Workbench) -> None:
    await bench.catalog.put_route("nice", [], best_of=2)
    with bench.database.reading() as connection:
        assert connection.execute(text("SELECT options FROM route_revisions")).scalar_one() is None
    assert bench.catalog.state.route("nice").options == SteeringOptions()


async def test_an_alpha_of_zero_is_not_taken_for_the_default(bench: Workbench) -> None:
    await bench.register("kind", 1.0, alpha=0.75)
    resolved = await bench.catalog.resolve("base", steering(AdapterChoice(name="kind", alpha=0.0)))
    assert resolved.steering[0].alpha == 0.0


async def test_unknown_adapters_and_versions_are_not_found(bench: Workbench) -> None:
    kind, calm = await bench.register("kind", 1.0), await bench.register("calm", 2.0)
    for choice, code in (
        (AdapterChoice(name="rude"), "adapter_not_found"),
        (AdapterChoice(name="kind", version="0" * 16), "version_not_found"),
        (AdapterChoice(name="kind", version=calm.version), "version_not_found"),  # another adapter's
    ):
        with pytest.raises(NotFoundError) as caught:
            await bench.catalog.resolve("base", steering(choice))
        assert (caught.value.param, caught.value.code) == ("steering", code)
    assert await bench.catalog.version(kind.version) == kind
    with pytest.raises(NotFoundError):
        await bench.catalog.version("0" * 16)


async def test_the_same_version_twice_and_too_many_adapters_are_refused(bench: Workbench) -> None:
    version = await bench.register("kind", 1.0)
    twice = steering(AdapterChoice(name="kind"), AdapterChoice(name="kind", version=version.version))
    with pytest.raises(InvalidRequestError, match="twice"):
        await bench.catalog.resolve("base", twice)
    nine = SteeringRequest.model_construct(adapters=[AdapterChoice(name="kind")] * 9)
    with pytest.raises(InvalidRequestError, match="at most 8"):
        await bench.catalog.resolve("base", nine)


async def test_a_retired_version_is_refused_and_the_newest_other_one_is_used(bench: Workbench) -> None:
    first, second = await bench.register("kind", 1.0), await bench.register("kind", 2.0)
    retired = await bench.catalog.retire_version("kind", second.version)
    assert retired.retired_at is not None
    assert await bench.catalog.retire_version("kind", second.version) == retired
    resolved = await bench.catalog.resolve("base", steering(AdapterChoice(name="kind")))
    assert resolved.steering[0].version == first.version
    with pytest.raises(InvalidRequestError, match="is retired"):
        await bench.catalog.resolve("base", steering(AdapterChoice(name="kind", version=second.version)))
    await bench.catalog.retire_version("kind", first.version)
    with pytest.raises(InvalidRequestError, match="All versions"):
        await bench.catalog.resolve("base", steering(AdapterChoice(name="kind")))


async def test_registering_a_retired_version_again_makes_it_usable(bench: Workbench) -> None:
    version = await bench.register("kind", 1.0)
    await bench.catalog.retire_version("kind", version.version)
    assert await bench.register("kind", 1.0) == version


async def test_a_version_in_use_cannot_be_retired_until_the_route_has_moved_on(bench: Workbench) -> None:
    first, second = await bench.register("kind", 1.0), await bench.register("kind", 2.0)
    await bench.catalog.activate("nice", "kind", first.version)
    with pytest.raises(ConflictError, match="in use by the routes nice"):
        await bench.catalog.retire_version("kind", first.version)
    await bench.catalog.activate("nice", "kind", second.version)
    await bench.catalog.retire_version("kind", first.version)
    with pytest.raises(ConflictError, match="cannot be rolled back"):
        await bench.catalog.rollback("nice")
    with pytest.raises(NotFoundError):
        await bench.catalog.retire_version("calm", second.version)


async def test_everything_is_there_again_after_a_restart(bench: Workbench) -> None:
    first, second = await bench.register("kind", 1.0), await bench.register("kind", 2.0)
    await bench.catalog.put_route("nice", [], best_of=2, comment="first \x00")
    await bench.catalog.activate("nice", "kind", first.version, alpha=0.5)
    await bench.catalog.retire_version("kind", second.version)
    again = bench.open()
    await again.load()
    assert await again.versions() == await bench.catalog.versions()
    assert await again.routes() == await bench.catalog.routes()
    assert await again.active_versions() == [first]
    assert await again.history("nice") == await bench.catalog.history("nice")
    assert (await again.history("nice"))[0].comment == "first \x00"


async def test_activating_keeps_best_of_reward_and_the_other_adapters(bench: Workbench) -> None:
    old, calm = await bench.register("kind", 1.0), await bench.register("calm", 3.0)
    new = await bench.register("kind", 2.0, alpha=0.75)
    terms = [
        AdapterWeight(name="calm", version=calm.version, alpha=-0.5),
        AdapterWeight(name="kind", version=old.version, alpha=1.0),
    ]
    await bench.catalog.put_route("nice", terms, best_of=4, reward="r")
    revision = await bench.catalog.activate("nice", "kind", comment="trained")
    assert revision.steering == (terms[0], AdapterWeight(name="kind", version=new.version, alpha=0.75))
    assert (revision.revision, revision.best_of, revision.reward, revision.comment) == (2, 4, "r", "trained")


async def test_activating_an_adapter_that_the_route_does_not_use_makes_it_the_only_one(bench: Workbench) -> None:
    await bench.register("kind", 1.0)
    calm = await bench.register("calm", 3.0)
    await bench.catalog.activate("nice", "kind")
    revision = await bench.catalog.activate("nice", "calm", alpha=2.0)
    assert revision.steering == (AdapterWeight(name="calm", version=calm.version, alpha=2.0),)


async def test_activating_is_refused_where_it_would_be_ambiguous(bench: Workbench) -> None:
    first, second = await bench.register("kind", 1.0), await bench.register("kind", 2.0)
    terms = [AdapterWeight(name="kind", version=v.version, alpha=1.0) for v in (first, second)]
    await bench.catalog.put_route("nice", terms)
    with pytest.raises(ConflictError, match="several versions"):
        await bench.catalog.activate("nice", "kind")


async def test_a_switch_is_refused_when_the_route_has_changed_meanwhile(bench: Workbench) -> None:
    await bench.catalog.put_route("nice", [])
    await bench.catalog.put_route("nice", [], best_of=2)
    with pytest.raises(ConflictError, match="at the same time"):
        await bench.catalog.switch("nice", [], expected_revision=1)
    assert (await bench.catalog.switch("nice", [], expected_revision=2)).revision == 3
    assert (await bench.catalog.switch("new", [], expected_revision=0)).revision == 1


async def test_rolling_back_makes_a_new_revision_like_the_earlier_one(bench: Workbench) -> None:
    first, second = await bench.register("kind", 1.0), await bench.register("kind", 2.0)
    one = await bench.catalog.activate("nice", "kind", first.version, alpha=0.5)
    await bench.catalog.activate("nice", "kind", second.version)
    three = await bench.catalog.rollback("nice")
    assert three == replace(one, revision=3, created_at=three.created_at, comment="rollback to revision 1")
    four = await bench.catalog.rollback("nice", 2)
    assert four.steering[0].version == second.version
    assert [revision.revision for revision in await bench.catalog.history("nice")] == [1, 2, 3, 4]


async def test_a_rollback_needs_an_earlier_revision(bench: Workbench) -> None:
    with pytest.raises(NotFoundError):
        await bench.catalog.rollback("nice")
    await bench.catalog.put_route("nice", [])
    with pytest.raises(ConflictError, match="no earlier revision"):
        await bench.catalog.rollback("nice")
    for revision in (1, 7):
        with pytest.raises(ConflictError, match="not earlier"):
            await bench.catalog.rollback("nice", revision)
    with pytest.raises(NotFoundError, match="no revision 0"):
        await bench.catalog.rollback("nice", 0)


async def test_a_deleted_route_is_gone_but_its_history_goes_on(bench: Workbench) -> None:
    await bench.catalog.put_route("nice", [])
    await bench.catalog.delete_route("nice")
    with pytest.raises(NotFoundError):
        await bench.catalog.resolve("nice", None)
    with pytest.raises(NotFoundError):
        await bench.catalog.delete_route("nice")
    assert (await bench.catalog.put_route("nice", [])).revision == 2
    assert len(await bench.catalog.history("nice")) == 2
    for unknown in ("other", "nul\x00"):
        with pytest.raises(NotFoundError):
            await bench.catalog.history(unknown)


@pytest.mark.parametrize("name", ["", "a/b", "-x", "x" * 65, "nul\x00"])
async def test_a_bad_route_name_is_refused(bench: Workbench, name: str) -> None:
    with pytest.raises(InvalidRequestError, match="not a route name"):
        await bench.catalog.put_route(name, [])


async def test_a_route_may_not_hide_the_base_model(bench: Workbench, tmp_path: Path) -> None:
    with pytest.raises(ConflictError, match="base model"):
        await bench.catalog.put_route("base", [])
    await bench.register("kind", 1.0)
    await bench.catalog.activate("nice", "kind")
    renamed = SqlCatalog(bench.database, bench.store, "nice")
    await renamed.load()
    assert (await renamed.resolve("nice", None)).steering == ()


async def test_a_version_that_the_engine_refuses_is_not_registered_and_not_kept(
    bench: Workbench, tmp_path: Path
) -> None:
    source = make_model_directory(tmp_path / "source")
    for error in (WeightsError("shape"), EngineUnavailableError("starting")):

        async def refuse(version: AdapterVersion, error: Exception = error) -> None:
            assert Path(version.path, "manifest.json").exists()
            raise error

        with pytest.raises(type(error)):
            await bench.catalog.register(source, name="kind", validate=refuse)
        assert await bench.catalog.versions() == []
        assert list(bench.store.root.iterdir()) == []


async def test_a_known_version_is_not_validated_again(bench: Workbench) -> None:
    version = await bench.register("kind", 1.0)

    async def refuse(version: AdapterVersion) -> None:
        raise WeightsError("shape")

    assert await bench.catalog.register(bench.directory / "kind-1.0", name="kind", validate=refuse) == version


async def test_changes_at_the_same_time_are_all_made_and_remembered(bench: Workbench) -> None:
    other = bench.open()
    await asyncio.gather(
        *(catalog.put_route("nice", [], best_of=n) for n in range(1, 6) for catalog in (bench.catalog, other))
    )
    await other.load()
    history = await other.history("nice")
    assert [revision.revision for revision in history] == list(range(1, 11))
    assert (await other.routes())[0] == history[-1]


async def test_a_caller_that_goes_away_leaves_memory_and_database_agreed(bench: Workbench) -> None:
    task = asyncio.create_task(bench.catalog.put_route("nice", []))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await bench.catalog.put_route("other", [])
    again = bench.open()
    await again.load()
    assert await again.routes() == await bench.catalog.routes()


async def test_pinned_versions_are_kept_over_a_restart_until_they_are_unpinned_or_retired(bench: Workbench) -> None:
    first, second = await bench.register("kind", 1.0), await bench.register("kind", 2.0)
    pinned = await bench.catalog.pin_version("kind", first.version)
    assert pinned.pinned_at is not None
    assert await bench.catalog.pin_version("kind", first.version) == pinned, "twice is harmless"
    again = bench.open()
    await again.load()
    assert await again.active_versions() == [pinned]
    assert (again.is_kept(first.version), again.is_kept(second.version)) == (True, False)
    await again.activate("nice", "kind", second.version)
    assert again.is_kept(second.version), "a route uses it"
    assert (await again.unpin_version("kind", first.version)).pinned_at is None
    assert not again.is_kept(first.version)
    await again.pin_version("kind", first.version)
    assert (await again.retire_version("kind", first.version)).pinned_at is None
    with pytest.raises(InvalidRequestError):
        await again.pin_version("kind", first.version)
    with pytest.raises(NotFoundError):
        await again.unpin_version("kind", "0" * 16)
