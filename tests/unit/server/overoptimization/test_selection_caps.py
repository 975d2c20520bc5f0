"""Warnings of requests that go beyond a cap."""

from collections.abc import Sequence
from typing import Any

import pytest
from typing_extensions import override

from trimtab_adapters.contract.errors import StorageError
from trimtab_adapters.contract.selection_cap import SelectionCap
from trimtab_server.overoptimization.selection_caps import MemorySelectionCapStore, SelectionCaps

pytestmark = pytest.mark.anyio


def cap(**changes: Any) -> SelectionCap:
    fields: dict[str, Any] = {
        "proxy": "kind@1",
        "gold": "judge@4",
        "base_model": "base",
        "num_prompts": 25,
        "num_samples": 200,
        "num_rollouts": 230,
        "left_out": {"of temperature 0": 30},
        "curve": [],
        "alpha": 1.0,
        "alpha_standard_error": 0.1,
        "beta": 0.5,
        "beta_standard_error": 0.1,
        "verdict": "cap",
        "cap": 6,
        "created_at": 86_400.0,
    }
    return SelectionCap.model_validate({**fields, **changes})


class FlakyStore(MemorySelectionCapStore):
    """Counts reads, and fails on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.num_reads = 0
        self.is_down = False

    @override
    async def list(self) -> Sequence[SelectionCap]:
        self.num_reads += 1
        if self.is_down:
            raise StorageError("down")
        return await super().list()


async def test_a_request_beyond_the_cap_is_told_what_was_measured() -> None:
    caps = SelectionCaps(MemorySelectionCapStore())
    await caps.put(cap())
    assert await caps.warning("kind@1", "base", 7) == (
        "7 candidates are more than the 6 up to which choosing by kind@1 was found to raise judge@4; beyond that it "
        "falls (measured on 25 prompts, 1970-01-02)"
    )
    assert await caps.warning("kind@1", "base", 6) is None


async def test_a_cap_holds_for_its_reward_version_and_base_model() -> None:
    caps = SelectionCaps(MemorySelectionCapStore())
    await caps.put(cap())
    assert await caps.warning("kind@2", "base", 100) is None
    assert await caps.warning("kind@1", "other", 100) is None
    assert await caps.warning("judge@4", "base", 100) is None


async def test_no_cap_is_no_warning() -> None:
    caps = SelectionCaps(MemorySelectionCapStore())
    assert await caps.warning("kind@1", "base", 1000) is None
    await caps.put(cap(cap=None, verdict="beyond the data"))
    assert await caps.warning("kind@1", "base", 1000) is None


async def test_of_several_caps_the_smallest_that_is_exceeded_speaks() -> None:
    caps = SelectionCaps(MemorySelectionCapStore())
    for gold, limit in (("a@1", 9), ("b@1", 4), ("c@1", 50)):
        await caps.put(cap(gold=gold, cap=limit))
    warning = await caps.warning("kind@1", "base", 16)
    assert warning is not None
    assert "the 4 up to which" in warning
    assert "b@1" in warning


async def test_a_new_measurement_takes_the_place_of_the_old_at_once() -> None:
    caps = SelectionCaps(MemorySelectionCapStore())
    await caps.put(cap())
    assert await caps.warning("kind@1", "base", 8) is not None
    await caps.put(cap(cap=10))
    assert await caps.warning("kind@1", "base", 8) is None
    assert [c.cap for c in await caps.list()] == [10]


async def test_the_store_is_read_once_a_minute() -> None:
    store, now = FlakyStore(), [0.0]
    caps = SelectionCaps(store, clock=lambda: now[0])
    assert await caps.warning("kind@1", "base", 8) is None
    await store.put(cap())  # by another gateway
    now[0] = 59.0
    assert await caps.warning("kind@1", "base", 8) is None
    assert store.num_reads == 1
    now[0] = 60.0
    assert await caps.warning("kind@1", "base", 8) is not None
    assert await caps.warning("kind@1", "base", 8) is not None
    assert store.num_reads == 2


async def test_a_store_that_fails_neither_fails_a_request_nor_is_asked_by_each() -> None:
    store, now = FlakyStore(), [0.0]
    caps = SelectionCaps(store, clock=lambda: now[0])
    await caps.put(cap())
    assert await caps.warning("kind@1", "base", 8) is not None
    store.is_down, now[0] = True, 100.0
    for _ in range(3):
        assert await caps.warning("kind@1", "base", 8) is not None
    assert store.num_reads == 2
    with pytest.raises(StorageError):
        await caps.list()


async def test_the_newest_is_listed_first() -> None:
    caps = SelectionCaps(MemorySelectionCapStore())
    await caps.put(cap(gold="a@1", created_at=1.0))
    await caps.put(cap(gold="b@1", created_at=2.0))
    assert [c.gold for c in await caps.list()] == ["b@1", "a@1"]
