"""The hard limit on the memory of adapter weights inside an engine."""

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_directories import write_lora, write_model
from steering_reference import base_description
from tiny_models import TinyModels, write_manifest
from trimtab_adapters import residents as residents_module
from trimtab_adapters.adapter_lm import read_adapter_lm
from trimtab_adapters.contract.engine_api import LoadedVersion
from trimtab_adapters.contract.errors import AdapterMemoryFullError, AdapterTooLargeError
from trimtab_adapters.contract.manifest import read_manifest
from trimtab_adapters.residents import Residents
from trimtab_adapters.store import VersionStore
from trimtab_adapters.weight_budget import WeightBudget, added_bytes, trunk_bytes


def build(tiny_models: TinyModels, budget: int | None, **options: Any) -> Residents:
    base = base_description(tiny_models.base)
    options = {"dtype": torch.float32} | options
    return Residents(base, torch.device("cpu"), kv_bytes=1 << 24, weight_bytes=budget, **options)


def wait(residents: Residents, version: str) -> LoadedVersion:
    while (status := residents.poll(version)).state == "loading":
        time.sleep(0.002)
    return status


def size(directory: Path) -> int:
    return added_bytes(read_manifest(directory), directory, torch.float32)


def versions(tiny_models: TinyModels, root: Path, number: int) -> list[tuple[str, Path]]:
    """As many versions of the same weights."""
    found = []
    for index in range(number):
        directory = Path(shutil.copytree(tiny_models.adapter, root / str(index)))
        found.append((write_manifest(directory, f"a{index}").version_id, directory))
    return found


def test_reservations_are_bounded_and_given_back() -> None:
    budget = WeightBudget(10)
    one, two = budget.reserve(), budget.reserve()
    one.resize(6)
    with pytest.raises(AdapterMemoryFullError, match="budget is 10 bytes, 6 are taken, 5 are needed"):
        two.resize(5)
    with pytest.raises(AdapterTooLargeError, match="takes 11 bytes and the engine's whole adapter memory is 10"):
        two.resize(11)
    assert (budget.used_bytes, two.wanted_bytes) == (6, 11)
    one.resize(5)
    two.resize(5)
    one.release()
    one.release()
    assert budget.used_bytes == 5


def test_loras_of_one_lm_pay_for_it_once_and_are_refused_before_it_is_read_again(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk, store = write_model(tmp_path / "trunk", "Llama", seed=1), VersionStore(tmp_path / "store")
    found = [store.add(write_lora(tmp_path / f"l{n}", trunk, seed=n), name=f"l{n}", trunk=trunk) for n in range(3)]
    own = added_bytes(*found[0], torch.float32)
    shared = trunk_bytes(found[0][1], torch.float32)
    assert 0 < own < shared
    residents = build(tiny_models, shared + 2 * own)
    states = []
    for manifest, path in found:
        residents.prepare(manifest.version_id, str(path))
        states.append(wait(residents, manifest.version_id))
        monkeypatch.setattr(residents_module, "read_adapter_lm", None)  # nobody may read the trunk again
    assert [status.state for status in states] == ["prepared", "prepared", "failed"]
    assert [status.weight_bytes for status in states] == [own] * 3
    assert states[2].error_code == "adapter_memory_full"
    assert residents.weight_status().used_bytes == shared + 2 * own
    for manifest, _ in found:
        residents.retire(manifest.version_id)
    assert residents.weight_status().used_bytes == 0


def test_what_the_headers_say_is_what_loading_takes(tiny_models: TinyModels) -> None:
    manifest = read_manifest(tiny_models.adapter)
    residents = build(tiny_models, None)
    residents.prepare(manifest.version_id, str(tiny_models.adapter))
    assert wait(residents, manifest.version_id).weight_bytes == size(tiny_models.adapter)
    assert added_bytes(manifest, tiny_models.adapter, torch.bfloat16) * 2 == size(tiny_models.adapter)
    assert added_bytes(manifest, tiny_models.adapter, None) == size(tiny_models.adapter)
    status = residents.weight_status()
    assert (status.budget_bytes, status.used_bytes) == (None, size(tiny_models.adapter))


def test_a_version_without_room_is_refused_before_its_weights_are_read(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = size(tiny_models.adapter)
    residents = build(tiny_models, 2 * one)
    three = versions(tiny_models, tmp_path, 3)
    for version, directory in three[:2]:
        residents.prepare(version, str(directory))
        wait(residents, version)
        residents.commit(version)
    with monkeypatch.context() as patch:
        patch.setattr(residents_module, "read_adapter_lm", None)
        residents.prepare(three[2][0], str(three[2][1]))
        status = wait(residents, three[2][0])
    assert (status.state, status.error_code, status.weight_bytes) == ("failed", "adapter_memory_full", one)
    assert str(2 * one) in str(status.error)
    assert residents.weight_status().used_bytes == 2 * one
    residents.retire(three[0][0])
    residents.prepare(three[2][0], str(three[2][1]))
    assert wait(residents, three[2][0]).state == "prepared"


def test_one_that_never_fits_is_told_so(tiny_models: TinyModels) -> None:
    residents = build(tiny_models, size(tiny_models.adapter) - 1)
    version = read_manifest(tiny_models.adapter).version_id
    residents.prepare(version, str(tiny_models.adapter))
    status = wait(residents, version)
    assert (status.state, status.error_code) == ("failed", "adapter_too_large")
    assert "larger --adapter-memory" in str(status.error)
    assert residents.weight_status().used_bytes == 0


def test_one_that_turns_out_larger_is_refused_and_its_memory_given_back(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed = []
    load = read_adapter_lm

    def swollen(*args: Any, **options: Any) -> Any:
        unchecked = load(*args, **options)
        unchecked.adapter.weight_bytes *= 2
        monkeypatch.setattr(unchecked.adapter, "free", lambda: freed.append(unchecked))
        return unchecked

    monkeypatch.setattr(residents_module, "read_adapter_lm", swollen)
    residents = build(tiny_models, size(tiny_models.adapter))
    version = read_manifest(tiny_models.adapter).version_id
    residents.prepare(version, str(tiny_models.adapter))
    status = wait(residents, version)
    assert (status.error_code, status.weight_bytes) == ("adapter_too_large", 2 * size(tiny_models.adapter))
    assert len(freed) == 1
    assert residents.weight_status().used_bytes == 0


def test_two_that_load_at_once_do_not_both_take_the_last_room(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, load = threading.Event(), read_adapter_lm

    def slow(*args: Any, **options: Any) -> Any:
        gate.wait(30)
        return load(*args, **options)

    monkeypatch.setattr(residents_module, "read_adapter_lm", slow)
    one = size(tiny_models.adapter)
    residents = build(tiny_models, one)
    two = versions(tiny_models, tmp_path, 2)
    residents.prepare(two[0][0], str(two[0][1]))
    while residents.weight_status().used_bytes == 0:
        time.sleep(0.001)
    assert (residents.poll(two[0][0]).state, residents.poll(two[0][0]).weight_bytes) == ("loading", one)
    residents.prepare(two[1][0], str(two[1][1]))
    assert wait(residents, two[1][0]).error_code == "adapter_memory_full"
    gate.set()
    assert wait(residents, two[0][0]).state == "prepared"


def test_a_version_retired_while_it_loads_leaves_nothing_taken(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, load = threading.Event(), read_adapter_lm

    def slow(*args: Any, **options: Any) -> Any:
        gate.wait(30)
        return load(*args, **options)

    monkeypatch.setattr(residents_module, "read_adapter_lm", slow)
    residents = build(tiny_models, None)
    version = read_manifest(tiny_models.adapter).version_id
    residents.prepare(version, str(tiny_models.adapter))
    assert residents.retire(version) == 0
    gate.set()
    for thread in threading.enumerate():
        if thread.name == f"load-{version}":
            thread.join(30)
    assert residents.weight_status().used_bytes == 0
    assert residents.versions() == []
