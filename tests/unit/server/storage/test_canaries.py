"""Canaries as revisions of their routes, on every kind of database."""

from pathlib import Path

import pytest

from trimtab_adapters.contract.errors import ConflictError, InvalidRequestError, NotFoundError
from trimtab_adapters.contract.params import AdapterChoice, AdapterWeight, SteeringRequest
from trimtab_adapters.store import VersionStore
from trimtab_server.canary.split import takes_canary
from trimtab_server.storage.base import AdapterVersion, Canary, CanaryArm
from trimtab_server.storage.canaries import SqlCanaries
from trimtab_server.storage.catalog import SqlCatalog
from trimtab_server.storage.database import Database
from version_directories import make_model_directory

pytestmark = pytest.mark.anyio


class Workbench:
    """A route `kind` at revision 1 with an old version, and a new version beside it."""

    def __init__(self, database: Database, directory: Path) -> None:
        self.database = database
        self.directory = directory
        self.catalog = self.reopened()
        self.canaries = SqlCanaries(self.catalog)

    def reopened(self) -> SqlCatalog:
        """Another catalog over the same database, as after a restart."""
        return SqlCatalog(self.database, VersionStore(self.directory / "store"), "base")

    async def register(self, weight: float) -> AdapterVersion:
        source = self.directory / f"kind-{weight}"
        make_model_directory(source, weight=weight)
        return await self.catalog.register(source, name="kind")

    async def prepare(self) -> None:
        self.old, self.new = await self.register(0.1), await self.register(0.2)
        await self.catalog.put_route("kind", [self.weight(self.old)], best_of=4, reward="r")

    def weight(self, version: AdapterVersion) -> AdapterWeight:
        return AdapterWeight(name="kind", version=version.version, alpha=1.0)

    def canary(self, percent: float = 30.0) -> Canary:
        return Canary(self.new.version, (self.weight(self.new),), percent, 100, 10, 60.0)

    async def start(self) -> None:
        await self.canaries.start_canary("kind", self.canary(), comment="try it", expected_revision=1)


@pytest.fixture
async def bench(database: Database, tmp_path: Path) -> Workbench:
    made = Workbench(database, tmp_path)
    await made.prepare()
    return made


async def test_a_canary_is_a_revision_that_survives_a_restart(bench: Workbench) -> None:
    await bench.start()
    again = bench.reopened()
    await again.load()
    revision = again.state.route("kind")
    assert revision == bench.catalog.state.route("kind")
    assert (revision.revision, revision.canary, revision.comment) == (2, bench.canary(), "try it")
    assert revision.steering == (bench.weight(bench.old),)
    assert (revision.best_of, revision.reward) == (4, "r")


async def test_a_share_of_the_requests_is_steered_by_the_new_version(bench: Workbench) -> None:
    await bench.start()
    taken = 0
    for i in range(200):
        resolved = await bench.catalog.resolve("kind", None, f"req-{i}")
        is_canary = takes_canary("kind", 2, f"req-{i}", 30.0)
        assert resolved.canary == CanaryArm(2, bench.new.version, 30.0, is_canary)
        assert resolved.steering == (bench.weight(bench.new if is_canary else bench.old),)
        assert (resolved.best_of, resolved.reward) == (4, "r")
        taken += is_canary
    assert 0 < taken < 200


async def test_without_a_request_id_or_with_adapters_of_its_own_a_request_tries_nothing(bench: Workbench) -> None:
    await bench.start()
    assert (await bench.catalog.resolve("kind", None)).canary is None
    named = SteeringRequest(adapters=[AdapterChoice(name="kind", version=bench.old.version)])
    for i in range(20):
        resolved = await bench.catalog.resolve("kind", named, f"req-{i}")
        assert resolved.canary is None
        assert resolved.steering == (bench.weight(bench.old),)
        assert (await bench.catalog.resolve("base", None, f"req-{i}")).canary is None
    scaled = SteeringRequest(plausibility=0.1)
    assert (await bench.catalog.resolve("kind", scaled, "req-1")).canary is not None


async def test_the_new_version_is_kept_in_memory_and_cannot_be_retired(bench: Workbench) -> None:
    assert not bench.catalog.is_kept(bench.new.version)
    await bench.start()
    assert bench.catalog.is_kept(bench.new.version)
    assert {v.version for v in await bench.catalog.active_versions()} == {bench.old.version, bench.new.version}
    with pytest.raises(ConflictError, match="in use by the routes kind"):
        await bench.catalog.retire_version("kind", bench.new.version)


@pytest.mark.parametrize("is_promoted", [True, False])
async def test_a_canary_ends_with_either_version_and_the_old_rest(bench: Workbench, is_promoted: bool) -> None:
    await bench.start()
    ended = await bench.canaries.end_canary("kind", 2, is_promoted=is_promoted, comment="because")
    assert (ended.revision, ended.canary, ended.comment) == (3, None, "because")
    assert ended.steering == (bench.weight(bench.new if is_promoted else bench.old),)
    assert (ended.best_of, ended.reward) == (4, "r")
    with pytest.raises(ConflictError, match="ended already"):
        await bench.canaries.end_canary("kind", 2, is_promoted=True, comment="twice")
    with pytest.raises(ConflictError, match="ended already"):
        await bench.canaries.end_canary("kind", 3, is_promoted=True, comment="none")
    assert [revision.canary is not None for revision in await bench.catalog.history("kind")] == [False, True, False]


async def test_switching_and_rolling_back_end_a_canary(bench: Workbench) -> None:
    await bench.start()
    assert (await bench.catalog.activate("kind", "kind", bench.new.version)).canary is None
    back = await bench.catalog.rollback("kind")  # to the revision that had the canary
    assert (back.steering, back.canary) == ((bench.weight(bench.old),), None)
    await bench.canaries.start_canary("kind", bench.canary(), comment="", expected_revision=back.revision)
    assert (await bench.catalog.rollback("kind")).canary is None
    await bench.canaries.start_canary("kind", bench.canary(), comment="", expected_revision=6)
    assert (await bench.catalog.put_route("kind", [])).canary is None


async def test_what_cannot_be_tried_is_refused(bench: Workbench) -> None:
    with pytest.raises(NotFoundError, match="nowhere"):
        await bench.canaries.start_canary("nowhere", bench.canary(), comment="", expected_revision=1)
    with pytest.raises(ConflictError, match="at the same time"):
        await bench.canaries.start_canary("kind", bench.canary(), comment="", expected_revision=7)
    same = Canary(bench.old.version, (bench.weight(bench.old),), 10.0, 100, 10, 60.0)
    with pytest.raises(ConflictError, match="already"):
        await bench.canaries.start_canary("kind", same, comment="", expected_revision=1)
    await bench.start()
    with pytest.raises(ConflictError) as running:
        await bench.canaries.start_canary("kind", bench.canary(), comment="", expected_revision=2)
    assert running.value.code == "canary_running"
    await bench.canaries.end_canary("kind", 2, is_promoted=False, comment="")
    await bench.catalog.retire_version("kind", bench.new.version)
    with pytest.raises(InvalidRequestError, match="retired"):
        await bench.canaries.start_canary("kind", bench.canary(), comment="", expected_revision=3)
