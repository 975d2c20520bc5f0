"""`POST /admin/routes/{name}/promote`: the gate, and the beginning of a canary."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from trimtab_adapters.contract.errors import EngineUnavailableError
from trimtab_adapters.contract.manifest import (
    MANIFEST_FILE,
    FileEntry,
    Manifest,
    read_vocabulary,
    vocabulary_fingerprint,
)
from version_directories import make_model_directory

pytestmark = pytest.mark.anyio

PASSED = {"gate": {"passed": True, "reasons": []}}
CLOSED = {"gate": {"passed": False, "reasons": ["the perplexity ratio is 3"]}}


async def register(bench: Any, weight: float, evaluation: dict[str, Any] | None = None) -> str:
    source = bench.directory / f"kind-{weight}"
    make_model_directory(source, weight=weight)
    if evaluation is not None:
        add_evaluation(source, evaluation)
    return str((await bench.call("POST", "adapters", json={"name": "kind", "path": str(source)}))["version"])


def add_evaluation(directory: Path, evaluation: dict[str, Any]) -> None:
    """Give a directory the manifest that training would write."""
    files = {
        path.name: FileEntry(sha256=hashlib.sha256(path.read_bytes()).hexdigest(), size_bytes=path.stat().st_size)
        for path in directory.iterdir()
        if path.name != MANIFEST_FILE
    }
    vocabulary = read_vocabulary(directory)
    manifest = Manifest(
        name="kind",
        vocabulary_sha256=vocabulary_fingerprint(vocabulary),
        vocab_size=len(vocabulary),
        files=files,
        evaluation=evaluation,
    )
    (directory / MANIFEST_FILE).write_text(manifest.model_dump_json())


async def routed(bench: Any) -> tuple[str, str]:
    """Versions: the one on the route `kind`, and one that has passed the gate."""
    old, new = await register(bench, 0.1), await register(bench, 0.2, PASSED)
    await bench.call("POST", "routes/kind/activate", json={"adapter": "kind", "version": old})
    bench.engine.calls.clear()
    return old, new


async def test_a_version_that_passed_the_gate_begins_as_a_canary(bench: Any) -> None:
    old, new = await routed(bench)
    answer = await bench.call("POST", "routes/kind/promote", json={"adapter": "kind", "percent": 5})
    assert (answer["revision"], answer["steering"][0]["version"]) == (2, old)
    weight = {"name": "kind", "version": new, "alpha": 1.0}
    assert answer["canary"] == {
        "version": new,
        "percent": 5.0,
        "steering": [weight],
        "num_answers": 400,
        "min_answers": 20,
        "timeout_s": 3600.0,
    }
    assert bench.engine.calls == [("load", new)]
    assert (await bench.call("GET", "routes/kind"))["canary"] == answer["canary"]
    shown = await bench.call("GET", "routes/kind/canary")
    assert (shown["version"], shown["percent"], shown["revision"]) == (new, 5.0, 2)
    nothing = {"num_answers": 0, "num_errors": 0, "num_rewards": 0, "mean_reward": None}
    assert shown["outcomes"] == {"canary": nothing, "stable": nothing}


@pytest.mark.parametrize(
    ("evaluation", "why"),
    [
        (CLOSED, "the perplexity ratio is 3"),
        ({"win_rate": 0.7}, "it was never evaluated"),
        ({"gate": {}}, "it was never evaluated"),
        (None, "never evaluated"),
    ],
)
async def test_a_version_that_did_not_pass_is_refused_unless_forced(
    bench: Any, evaluation: dict[str, Any] | None, why: str
) -> None:
    await routed(bench)
    version = await register(bench, 0.3, evaluation)
    bench.engine.calls.clear()
    body = {"adapter": "kind", "version": version}
    error = await bench.refused("POST", "routes/kind/promote", 409, json=body)
    assert error["code"] == "gate_not_passed"
    assert why in error["message"]
    assert bench.engine.calls == []
    forced = await bench.call("POST", "routes/kind/promote", json={**body, "force": True})
    assert forced["canary"]["version"] == version


async def test_what_cannot_be_tried_is_refused(bench: Any) -> None:
    old, new = await routed(bench)
    body = {"adapter": "kind", "version": new}
    assert (await bench.refused("POST", "routes/nowhere/promote", 404, json=body))["code"] == "route_not_found"
    assert (await bench.refused("GET", "routes/kind/canary", 404))["code"] == "no_canary"
    for wrong in ({"percent": 0}, {"percent": 100}, {"num_answers": 3}, {"timeout_s": 0}, {"min_answers": 500}):
        await bench.refused("POST", "routes/kind/promote", 400, json={**body, **wrong})
    same = {"adapter": "kind", "version": old, "force": True}
    await bench.refused("POST", "routes/kind/promote", 409, json=same)
    await bench.call("POST", "routes/kind/promote", json=body)
    assert (await bench.refused("POST", "routes/kind/promote", 409, json=body))["code"] == "canary_running"


async def test_nothing_changes_when_the_engine_cannot_load_the_version(bench: Any) -> None:
    _, new = await routed(bench)
    bench.engine.error = EngineUnavailableError("away")
    await bench.refused("POST", "routes/kind/promote", 503, json={"adapter": "kind", "version": new})
    assert (await bench.call("GET", "routes/kind"))["canary"] is None


async def test_a_rollback_ends_a_canary_and_activating_completes_it(bench: Any) -> None:
    old, new = await routed(bench)
    await bench.call("POST", "routes/kind/promote", json={"adapter": "kind", "version": new})
    back = await bench.call("POST", "routes/kind/rollback")
    assert (back["canary"], back["steering"][0]["version"]) == (None, old)
    await bench.call("POST", "routes/kind/promote", json={"adapter": "kind", "version": new})
    whole = await bench.call("POST", "routes/kind/activate", json={"adapter": "kind", "version": new})
    assert (whole["canary"], whole["steering"][0]["version"]) == (None, new)
