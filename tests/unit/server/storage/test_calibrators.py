"""Calibrators and reward specs, kept over restarts."""

import pytest

from trimtab_adapters.contract.calibration import ReferenceScores
from trimtab_adapters.contract.rewards import RewardSpec
from trimtab_server.storage.calibrators import SqlCalibratorStore
from trimtab_server.storage.database import Database
from trimtab_server.storage.reward_specs import SqlRewardSpecs

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
