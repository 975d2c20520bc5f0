"""Calibrators and reward specs, kept over restarts."""

from pathlib import Path

import pytest

from trimtab_adapters.contract.calibration import EmpiricalCalibrator
from trimtab_adapters.contract.errors import ConflictError
from trimtab_adapters.contract.rewards import RewardSpec
from trimtab_adapters.store import VersionStore
from trimtab_server.storage.calibrators import SqlCalibratorStore
from trimtab_server.storage.catalog import SqlCatalog
from trimtab_server.storage.database import Database
from trimtab_server.storage.reward_specs import SqlRewardSpecs

pytestmark = pytest.mark.anyio


async def test_a_calibrator_comes_back_exactly_and_can_be_replaced(database: Database) -> None:
    calibrators = SqlCalibratorStore(database)
    first = EmpiricalCalibrator.fit([0.1, 1 / 3, -2.0], reference="base", reward="kind@1")
    await calibrators.put("prompt", first)
    assert await calibrators.get("prompt", "kind@1", "base") == first
    second = EmpiricalCalibrator.fit([1.0], reference="base", reward="kind@1")
    await calibrators.put("prompt", second)
    assert await SqlCalibratorStore(database).get("prompt", "kind@1", "base") == second


async def test_a_calibrator_belongs_to_its_prompt_reward_and_reference(database: Database) -> None:
    calibrators = SqlCalibratorStore(database)
    await calibrators.put("prompt", EmpiricalCalibrator.fit([0.1], reference="base", reward="kind@1"))
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
