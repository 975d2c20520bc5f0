"""What counts as taken of an engine's adapter memory, and who may go."""

import pytest

from trimtab_adapters.contract.engine_api import CacheStatus, EngineStatus, LoadedVersion, WeightStatus
from trimtab_server.engine.adapter_memory import AdapterMemory

A, B, C, D = ("a" * 16, "b" * 16, "c" * 16, "d" * 16)


def status(*versions: LoadedVersion, budget: int | None = 100, used: int = 0) -> EngineStatus:
    cache = CacheStatus(
        budget_bytes=0,
        allocated_bytes=0,
        used_blocks=0,
        cached_blocks=0,
        total_blocks=0,
        block_size=16,
        hit_tokens=0,
        computed_tokens=0,
        recomputed_tokens=0,
    )
    return EngineStatus(
        boot_id="1",
        vllm_version="0.32.0",
        runner="v1",
        model="base",
        max_model_len=64,
        vocab_size=8,
        vocabulary_sha256="0" * 64,
        num_tokens=8,
        versions=list(versions),
        cache=cache,
        weights=WeightStatus(budget_bytes=budget, used_bytes=used),
        can_guide=True,
    )


def loaded(version: str, size: int) -> LoadedVersion:
    return LoadedVersion(version=version, name="x", state="committed", weight_bytes=size)


@pytest.fixture
def kept() -> set[str]:
    return set()


@pytest.fixture
def memory(kept: set[str]) -> AdapterMemory:
    """Room for 100: A has 30, B 40, C 20."""
    made = AdapterMemory(kept.__contains__)
    made.learn(status(loaded(A, 30), loaded(B, 40), loaded(C, 20), used=90))
    return made


def test_versions_take_memory_while_they_are_usable_loading_freed_or_promised(memory: AdapterMemory) -> None:
    memory.usable, memory.loading, memory.freeing = {A}, {B}, {C}
    assert memory.used_bytes == 30 + 40 + 20
    memory.usable, memory.loading, memory.freeing = set(), set(), {C}
    assert memory.used_bytes == 20  # it has been told to go, but it is still there
    memory.in_flight[B] += 1
    assert memory.used_bytes == 20 + 40


def test_what_the_engine_uses_beyond_versions_is_taken_too(memory: AdapterMemory) -> None:
    memory.learn(status(loaded(A, 30), used=37))
    assert memory.shared_bytes == 7
    memory.usable = {A}
    assert memory.used_bytes == 37


def test_a_version_on_its_way_out_is_not_claimed(memory: AdapterMemory) -> None:
    memory.usable, memory.loading = {A}, {B}
    assert memory.is_claimed({A, B})
    assert not memory.is_claimed({A, C})
    memory.freeing = {A}
    assert not memory.is_claimed({A})  # it would be gone before it is used
    memory.freeing, memory.usable, memory.loading = set(), set(), set()
    memory.in_flight[A] += 1
    assert memory.is_claimed({A})


def test_what_is_lacking_counts_those_being_freed_as_still_there(memory: AdapterMemory) -> None:
    memory.usable, memory.freeing = {A}, {B}
    assert memory.lacking_bytes({C}) == 30 + 40 + 20 - 100
    memory.suppose(D, 35)
    assert memory.lacking_bytes({D}) == 30 + 40 + 35 - 100
    # What is being freed counts towards what must be freed, so nobody else has to go for these five bytes.
    assert memory.victims(5, {D}) == []
    assert memory.victims(41, {D}) == [A]


def test_the_longest_unused_goes_first_and_those_in_use_kept_or_wanted_stay(
    memory: AdapterMemory, kept: set[str]
) -> None:
    memory.usable = {A, B, C}
    for version in (B, A, C):
        memory.touch(version)
    assert memory.victims(10, set()) == [B]
    assert memory.victims(45, set()) == [B, A]
    memory.in_flight[B] += 1
    assert memory.victims(10, set()) == [A]
    kept.add(A)
    assert memory.victims(10, set()) == [C]
    assert memory.victims(10, {C}) is None


def test_an_unknown_size_is_an_estimate_until_the_engine_has_said_it(memory: AdapterMemory) -> None:
    memory.suppose(D, 90)
    memory.loading = {D}
    assert memory.used_bytes == 90
    memory.learn_size(D, 60)
    memory.suppose(D, 90)
    assert memory.used_bytes == 60


def test_only_known_sizes_make_a_request_impossible(memory: AdapterMemory) -> None:
    memory.suppose(D, 1000)
    assert not memory.is_impossible({D})
    assert not memory.is_impossible({A, B, C})  # 90 of 100
    memory.learn_size(D, 11)
    assert memory.is_impossible({A, B, C, D})
