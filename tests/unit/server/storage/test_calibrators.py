"""Calibrators and reward specs, kept over restarts."""

from pathlib import Path

import numpy as np
import pytest

from trimtab_adapters.contract.calibration import ReferenceScores
from trimtab_adapters.contract.errors import ConflictError, StorageError
from trimtab_adapters.contract.pooled_calibration import PooledCalibrator
from trimtab_adapters.contract.prompt_features import NUM_BUCKETS, PromptFeatures
from trimtab_adapters.contract.rewards import RewardSpec
from trimtab_adapters.store import VersionStore
from trimtab_server.storage.base import StoredPooledCalibrator
from trimtab_server.storage.calibrators import SqlCalibratorStore, SqlPooledCalibratorStore
from trimtab_server.storage.catalog import SqlCatalog
from trimtab_server.storage.database import Database
from trimtab_server.storage.reward_specs import SqlRewardSpecs
from trimtab_server.storage.tables import pooled_calibrators

pytestmark = pytest.mark.anyio


async def test_a_calibrator_comes_back_exactly_and_can_be_replaced(database: Database) -> None:
    calibrators = SqlCalibratorStore(database)
    first = ReferenceScores.fit([[0.1, 1 / 3], [-2.0, 5e-324]], reference="base", reward="kind@1")
    await calibrators.put("prompt", first)
    assert await calibrators.get("prompt", "kind@1", "base") == first
    second = ReferenceScores.fit([[1.0]], reference="base", reward="kind@1")
    await calibrators.put("prompt", second)
    assert await SqlCalibratorStore(database).get("prompt", "kind@1", "base") == second


async def test_a_calibrator_belongs_to_its_prompt_reward_and_reference(database: Database) -> None:
    calibrators = SqlCalibratorStore(database)
    await calibrators.put("prompt", ReferenceScores.fit([[0.1]], reference="base", reward="kind@1"))
    assert await calibrators.get("other", "kind@1", "base") is None
    assert await calibrators.get("prompt", "kind@2", "base") is None
    assert await calibrators.get("prompt", "kind@1", "base@0.7") is None


async def test_options_of_a_reward_are_any_json(database: Database) -> None:
    options = {"schema": {"enum": [1, 2.5, "ä\ud83d", None, True, {"deep": [[]]}]}, "keywords": ["a", "b"]}
    spec = RewardSpec(name="a", kind="json_schema", options=options)
    await SqlRewardSpecs(database).put(spec)
    assert await SqlRewardSpecs(database).list() == [spec]


async def test_a_reward_is_deleted_unless_the_current_revision_of_a_route_names_it(
    database: Database, tmp_path: Path
) -> None:
    specs = SqlRewardSpecs(database)
    for name in ("a", "b"):
        await specs.put(RewardSpec(name=name, kind="sentiment"))
    catalog = SqlCatalog(database, VersionStore(tmp_path), "base")
    await catalog.load()
    for route in ("two", "one"):
        await catalog.put_route(route, [], reward="a")
    with pytest.raises(ConflictError, match="'a' is in use by the routes one, two"):
        await specs.delete("a")
    await catalog.put_route("one", [], reward="b")
    with pytest.raises(ConflictError, match="in use by the routes two"):
        await specs.delete("a")
    await catalog.delete_route("two")
    assert [await specs.delete("a"), await specs.delete("a"), await specs.delete("never")] == [True, False, False]
    assert [spec.name for spec in await specs.list()] == ["b"]


async def test_reward_specs_are_listed_by_name_and_replaced(database: Database) -> None:
    specs = SqlRewardSpecs(database)
    assert await specs.list() == []
    b = RewardSpec(name="b", kind="callable", target="t", options={"x": 1, "y": 0.5, "z": True, "w": "v"})
    a = RewardSpec(name="a", kind="callable", target="t")
    await specs.put(b)
    await specs.put(a)
    assert await specs.list() == [a, b]
    changed = RewardSpec(name="a", kind="hf_classifier", target="/models/x")
    await specs.put(changed)
    assert await SqlRewardSpecs(database).list() == [changed, b]


def pooled(calibrator_id: str, created_at: float, *, reward: str = "kind@1") -> StoredPooledCalibrator:
    rng = np.random.default_rng(0)
    calibrator = PooledCalibrator(
        PromptFeatures(rng.normal(size=(2, NUM_BUCKETS)), rng.normal(size=5), np.ones(5)),
        np.array([0.1, 0.5]),
        np.array([1 / 3, 2 / 3]),
        rng.normal(size=(2, 5)),
        "base",
        reward,
        40,
        5,
        0.125,
    )
    return StoredPooledCalibrator(calibrator_id, calibrator, {"model": "unconditional", "x": [0.1]}, created_at)


async def test_a_pooled_calibrator_comes_back_exactly(database: Database) -> None:
    store = SqlPooledCalibratorStore(database)
    kept = pooled("cal-1", 1.0)
    await store.add(kept)
    found = await SqlPooledCalibratorStore(database).get("cal-1")
    assert found is not None
    assert found.calibrator.to_json() == kept.calibrator.to_json()
    assert (found.id, found.report, found.created_at, found.reward_name) == ("cal-1", kept.report, 1.0, "kind")
    assert await store.get("cal-2") is None


async def test_pooled_calibrators_of_a_reward_are_listed_newest_first_and_deleted(database: Database) -> None:
    store = SqlPooledCalibratorStore(database)
    for one in (pooled("a", 1.0), pooled("b", 3.0, reward="kind@2"), pooled("c", 2.0, reward="rude@1")):
        await store.add(one)
    assert [one.id for one in await store.of_reward("kind")] == ["b", "a"]
    assert [one.id for one in await store.everything()] == ["b", "c", "a"]
    await SqlPooledCalibratorStore(database).delete("b")  # by another gateway
    await store.delete("b")
    assert await store.get("b") is None
    assert [one.id for one in await store.everything()] == ["c", "a"]


async def test_a_pooled_calibrator_of_a_newer_version_is_an_error(database: Database) -> None:
    await SqlPooledCalibratorStore(database).add(pooled("a", 1.0))
    with database.writing() as connection:
        connection.execute(pooled_calibrators.update().values(calibrator={"schema_version": 9}))
    with pytest.raises(StorageError, match="schema version 9"):
        await SqlPooledCalibratorStore(database).get("a")


async def test_per_prompt_calibrators_are_counted_by_reward_and_policy_and_deleted_together(database: Database) -> None:
    store = SqlCalibratorStore(database, clock=lambda: 7.0)
    for prompt, reward, reference, size in [
        ("p", "kind@1", "base", 2),
        ("q", "kind@1", "base", 3),
        ("p", "kind@1", "hot", 4),
        ("p", "kind@2", "base", 5),
    ]:
        await store.put(prompt, ReferenceScores.fit([[0.0, 1.0]] * size, reference=reference, reward=reward))
    groups = await store.groups()
    assert [(g.reward, g.reference, g.num_prompts, g.num_rollouts, g.updated_at) for g in groups] == [
        ("kind@1", "base", 2, 5, 7.0),
        ("kind@1", "hot", 1, 4, 7.0),
        ("kind@2", "base", 1, 5, 7.0),
    ]
    assert len({group.id for group in groups}) == 3
    await store.delete_group(groups[0])
    assert await store.groups() == groups[1:]
