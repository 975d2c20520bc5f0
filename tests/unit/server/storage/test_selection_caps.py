"""Measured caps, kept over restarts."""

from typing import Any

import pytest

from trimtab_adapters.contract.selection_cap import SelectionCap
from trimtab_server.storage.database import Database
from trimtab_server.storage.selection_caps import SqlSelectionCaps

pytestmark = pytest.mark.anyio


def cap(**changes: Any) -> SelectionCap:
    point = {
        "n": 2,
        "kl": 0.1931471805599453,
        "gold": 1 / 3,
        "gold_low": 0.1,
        "gold_high": 0.5,
        "gain": 0.1,
        "gain_standard_error": 0.01,
    }
    fields: dict[str, Any] = {
        "proxy": "kind@1",
        "gold": "judge@" + "4" * 3000,
        "base_model": "base",
        "num_prompts": 25,
        "num_samples": 200,
        "num_rollouts": 230,
        "left_out": {"of temperature 0": 30},
        "curve": [point],
        "alpha": 1.0,
        "alpha_standard_error": 0.1,
        "beta": 1 / 3,
        "beta_standard_error": 0.1,
        "verdict": "cap",
        "cap": 6,
        "route": None,
        "created_at": 1_700_000_000.123456,
    }
    return SelectionCap.model_validate({**fields, **changes})


async def test_a_cap_comes_back_exactly(database: Database) -> None:
    caps = SqlSelectionCaps(database)
    assert await caps.list() == []
    await caps.put(cap())
    assert await SqlSelectionCaps(database).list() == [cap()]


async def test_a_cap_replaces_the_one_of_the_same_rewards_and_base_model(database: Database) -> None:
    caps = SqlSelectionCaps(database)
    first = cap(created_at=1.0)
    await caps.put(first)
    newer = cap(cap=None, verdict="beyond the data", created_at=2.0)
    await caps.put(newer)
    assert await caps.list() == [newer]
    others = [cap(proxy="kind@2", created_at=3.0), cap(gold="g@1", created_at=4.0), cap(base_model="b", created_at=5.0)]
    for other in others:
        await caps.put(other)
    assert await caps.list() == [*reversed(others), newer]
    again = newer.model_copy(update={"created_at": 6.0})
    await caps.put(again)
    assert await caps.list() == [again, *reversed(others)]
