"""`/admin/adapters` and `/admin/routes` over HTTP."""

from pathlib import Path
from typing import Any

import pytest

from trimtab_adapters.contract.errors import AdapterMemoryFullError, EngineUnavailableError, WeightsError
from version_directories import make_lora_directory, make_model_directory

pytestmark = pytest.mark.anyio

Bench = Any


async def add(bench: Bench, name: str = "kind", weight: float = 1.0, **body: Any) -> dict[str, Any]:
    path = bench.directory / f"{name}-{weight}"
    if not path.exists():
        make_model_directory(path, weight=weight)
    answer = await bench.call("POST", "adapters", json={"name": name, "path": str(path), **body})
    return dict(answer)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "adapters"),
        ("GET", "adapters"),
        ("GET", "adapters/kind"),
        ("POST", "adapters/kind/versions/x/retire"),
        ("PUT", "adapters/kind/versions/x/pin"),
        ("DELETE", "adapters/kind/versions/x/pin"),
        ("GET", "routes"),
        ("PUT", "routes/nice"),
        ("DELETE", "routes/nice"),
        ("POST", "routes/nice/activate"),
        ("GET", "rollouts"),
        ("GET", "rollouts/export"),
        ("POST", "training-jobs/claim"),
        ("GET", "rewards"),
        ("GET", "engines"),
    ],
)
async def test_every_call_needs_the_admin_key(bench: Bench, method: str, path: str) -> None:
    for headers in ({"Authorization": "Bearer wrong"}, {"Authorization": ""}):
        error = await bench.refused(method, path, 401, headers=headers)
        assert error["code"] == "invalid_api_key"


async def test_a_registered_version_is_validated_and_listed(bench: Bench) -> None:
    version = await add(bench, prefix_token_ids=[3], default_alpha=0.5)
    assert version["object"] == "adapter.version"
    assert version["manifest"]["prefix_token_ids"] == [3]
    assert (version["routes"], version["retired_at"]) == ([], None)
    assert bench.engine.calls == [("validate", version["version"])]
    assert await bench.call("GET", "adapters") == {"object": "list", "data": [version]}
    assert await bench.call("GET", "adapters/kind") == {"object": "list", "data": [version]}
    assert await bench.call("GET", f"adapters/kind/versions/{version['version']}") == version


async def test_a_lora_is_registered_with_its_trunk(bench: Bench) -> None:
    trunk = str(make_model_directory(bench.directory / "trunk"))
    versions = []
    for weight in (1.0, 2.0):
        path = str(make_lora_directory(bench.directory / f"lora-{weight}", weight=weight))
        versions.append(await bench.call("POST", "adapters", json={"name": "kind", "path": path, "trunk": trunk}))
    loras = [version["manifest"]["lora"] for version in versions]
    assert loras[0] == loras[1]
    assert (loras[0]["r"], loras[0]["lora_alpha"]) == (1, 2.0)
    assert versions[0]["version"] != versions[1]["version"]
    error = await bench.refused("POST", "adapters", 400, json={"name": "kind", "path": path})
    assert "--trunk" in error["message"]
    error = await bench.refused("POST", "adapters", 400, json={"name": "kind", "path": path, "trunk": "small-lm"})
    assert error["param"] == "trunk"
    whole = await add(bench, "whole")
    assert "lora" not in whole["manifest"]


async def test_registering_with_a_route_loads_and_activates(bench: Bench) -> None:
    version = await add(bench, route="nice", alpha=2.0)
    assert version["routes"] == ["nice"]
    assert bench.engine.calls == [("validate", version["version"]), ("load", version["version"])]
    route = await bench.call("GET", "routes/nice")
    assert route["steering"] == [{"name": "kind", "version": version["version"], "alpha": 2.0}]


@pytest.mark.parametrize(("error", "status"), [(WeightsError("shape"), 400), (EngineUnavailableError("starting"), 503)])
async def test_what_the_engine_does_not_take_is_not_registered(bench: Bench, error: Any, status: int) -> None:
    bench.engine.error = error
    body = {"name": "kind", "path": str(make_model_directory(bench.directory / "kind"))}
    assert (await bench.refused("POST", "adapters", status, json=body))["message"] == error.message
    assert (await bench.call("GET", "adapters"))["data"] == []


async def test_another_tokenizer_is_refused(bench: Bench) -> None:
    bench.engine.vocabulary = ("0" * 64, 99)
    body = {"name": "kind", "path": str(make_model_directory(bench.directory / "kind"))}
    error = await bench.refused("POST", "adapters", 400, json=body)
    assert error["code"] == "vocabulary_mismatch"
    assert "99 tokens" in error["message"]


async def test_only_paths_inside_the_roots_are_read(bench: Bench, tmp_path: Path) -> None:
    outside = make_model_directory(tmp_path / "outside")
    (bench.directory / "link").symlink_to(outside)
    for path in (outside, bench.directory / ".." / "outside", bench.directory / "link"):
        error = await bench.refused("POST", "adapters", 403, json={"name": "kind", "path": str(path)})
        assert error["param"] == "path"
    lora = make_lora_directory(bench.directory / "lora")
    error = await bench.refused(
        "POST", "adapters", 403, json={"name": "kind", "path": str(lora), "trunk": str(outside)}
    )
    assert error["param"] == "trunk"
    for relative in ("kind", "a\x00b", ""):
        error = await bench.refused("POST", "adapters", 400, json={"name": "kind", "path": relative})
        assert error["param"] == "path"
    missing = {"name": "kind", "path": str(bench.directory / "missing")}
    assert (await bench.refused("POST", "adapters", 400, json=missing))["code"] == "integrity"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"path": "/x"}, "name"),
        ({"name": "a/b", "path": "/x"}, "name"),
        ({"name": "kind", "path": 1}, "path"),
        ({"name": "kind", "path": "/x", "default_alpha": 101}, "default_alpha"),
        ({"name": "kind", "path": "/x", "default_alpha": "1"}, None),
        ({"name": "kind", "path": "/x", "prefix_token_ids": [-1]}, None),
        ({"name": "kind", "path": "/x", "surprise": 1}, "surprise"),
        ({"name": "kind", "path": "/x", "alpha": 1.0}, "alpha"),
        ({"name": "kind", "path": "/x", "route": "base"}, "route"),
    ],
)
async def test_a_bad_body_is_refused_before_anything_is_read(
    bench: Bench, body: dict[str, Any], param: str | None
) -> None:
    response = await bench.client.post("/admin/adapters", json=body)
    assert response.status_code in (400, 403, 409)
    if param is not None:
        assert response.json()["error"]["param"] == param
    assert bench.engine.calls == []


async def test_malformed_json_and_other_content_types_are_refused(bench: Bench) -> None:
    headers = {"Content-Type": "application/json"}
    for content in (b"{", b"[]", b'{"name": NaN}', b"\xff"):
        error = await bench.refused("POST", "adapters", 400, content=content, headers=headers)
        assert error["code"] == "invalid_json"
    await bench.refused("POST", "adapters", 415, content=b"{}", headers={"Content-Type": "text/plain"})


async def test_retiring_frees_the_version_and_refuses_one_in_use(bench: Bench) -> None:
    version = (await add(bench, route="nice"))["version"]
    path = f"adapters/kind/versions/{version}/retire"
    assert (await bench.refused("POST", path, 409))["code"] == "conflict"
    await bench.call("DELETE", "routes/nice", 204)
    assert (await bench.call("POST", path))["retired_at"] is not None
    assert bench.engine.calls[-1] == ("free", version)


async def test_a_version_is_retired_even_when_no_engine_is_there(bench: Bench) -> None:
    version = (await add(bench))["version"]
    bench.engine.error = EngineUnavailableError("restarting")
    assert (await bench.call("POST", f"adapters/kind/versions/{version}/retire"))["retired_at"] is not None


async def test_a_version_is_pinned_when_the_engine_holds_it_and_unpinned(bench: Bench) -> None:
    version = (await add(bench))["version"]
    path = f"adapters/kind/versions/{version}/pin"
    bench.engine.error = AdapterMemoryFullError("the adapter memory is full")
    assert (await bench.refused("PUT", path, 503))["code"] == "adapter_memory_full"
    assert (await bench.call("GET", "adapters"))["data"][0]["pinned_at"] is None
    bench.engine.error = None
    pinned = await bench.call("PUT", path)
    assert bench.engine.calls[-1] == ("load", version)
    assert pinned["pinned_at"] > 0
    assert pinned["residency"] == {"state": "on_disk", "weight_bytes": 0, "in_flight": 0}
    assert (await bench.call("PUT", path))["pinned_at"] == pinned["pinned_at"]
    await bench.call("DELETE", path, 204)
    await bench.call("DELETE", path, 204)
    assert (await bench.call("GET", "adapters"))["data"][0]["pinned_at"] is None


async def test_a_retired_version_is_not_pinned(bench: Bench) -> None:
    version = (await add(bench))["version"]
    await bench.call("PUT", f"adapters/kind/versions/{version}/pin")
    retired = await bench.call("POST", f"adapters/kind/versions/{version}/retire")
    assert retired["pinned_at"] is None
    error = await bench.refused("PUT", f"adapters/kind/versions/{version}/pin", 400)
    assert error["code"] == "version_retired"


async def test_unknown_names_are_not_found(bench: Bench) -> None:
    await add(bench)
    for method, path in (
        ("GET", "adapters/rude"),
        ("GET", "adapters/kind/versions/0000"),
        ("POST", "adapters/kind/versions/0000/retire"),
        ("PUT", "adapters/kind/versions/0000/pin"),
        ("DELETE", "adapters/kind/versions/0000/pin"),
        ("GET", "routes/rude"),
        ("DELETE", "routes/rude"),
        ("POST", "routes/rude/rollback"),
        ("GET", "routes/rude/history"),
        ("GET", "routes/nul%00/history"),
    ):
        assert (await bench.refused(method, path, 404))["type"] == "not_found_error"
    error = await bench.refused("POST", "routes/nice/activate", 404, json={"adapter": "rude"})
    assert error["code"] == "adapter_not_found"


async def test_a_route_is_put_listed_and_deleted(bench: Bench) -> None:
    version = (await add(bench))["version"]
    body = {
        "steering": {"adapters": [{"name": "kind", "alpha": 0.5}], "max_kl": 0.5},
        "best_of": 4,
        "reward": "length",
        "comment": "first",
    }
    route = await bench.call("PUT", "routes/nice", json=body)
    assert route.pop("created_at") > 0
    assert route == {
        "object": "route",
        "route": "nice",
        "revision": 1,
        "steering": [{"name": "kind", "version": version, "alpha": 0.5}],
        "operators": {"max_kl": 0.5},
        "best_of": 4,
        "reward": "length",
        "comment": "first",
        "canary": None,
    }
    assert bench.engine.calls[-1] == ("load", version)
    assert [item["route"] for item in (await bench.call("GET", "routes"))["data"]] == ["nice"]
    await bench.call("DELETE", "routes/nice", 204)
    assert (await bench.call("GET", "routes"))["data"] == []
    assert len((await bench.call("GET", "routes/nice/history"))["data"]) == 1


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"steering": {"adapters": [{"name": "rude"}]}}, 404, "steering"),
        ({"steering": {"adapters": [{"name": "kind"}, {"name": "kind"}]}}, 400, "steering"),
        ({"steering": {"adapters": [{"name": "kind", "alpha": 1000}]}}, 400, None),
        ({"steering": {"adapters": [{"name": "kind"}] * 9}}, 400, None),
        ({"steering": {"plausibility": 2}}, 400, "steering.plausibility"),
        ({"steering": {"guidance_scale": 2}}, 400, "steering.guidance_scale"),
        ({"steering": {"negative_prompt": ""}}, 400, "steering.negative_prompt"),
        ({"steering": {"explain": True}}, 400, "steering.explain"),
        ({"best_of": 0}, 400, "best_of"),
        ({"best_of": 1.5}, 400, "best_of"),
        ({"reward": "nothing"}, 404, "reward"),
        ({"surprise": 1}, 400, "surprise"),
    ],
)
async def test_a_bad_route_is_refused_and_nothing_changes(
    bench: Bench, body: dict[str, Any], status: int, param: str | None
) -> None:
    await add(bench)
    error = await bench.refused("PUT", "routes/nice", status, json=body)
    if param is not None:
        assert error["param"] == param
    assert (await bench.call("GET", "routes"))["data"] == []


async def test_operators_stay_when_a_version_is_activated_and_come_back_by_rollback(bench: Bench) -> None:
    await add(bench)
    operators = {
        "schedule": {"start": 1, "first": 20, "decay": 0.5},
        "negative_prompt": [{"role": "user", "content": "Be rude.\x00"}],
        "guidance_scale": 2.0,
    }
    await bench.call("PUT", "routes/nice", json={"steering": {"adapters": [{"name": "kind"}], **operators}})
    await add(bench, weight=2.0)
    activated = await bench.call("POST", "routes/nice/activate", json={"adapter": "kind"})
    assert activated["operators"] == operators
    assert (await bench.call("PUT", "routes/nice", json={}))["operators"] == {}
    back = await bench.call("POST", "routes/nice/rollback", json={"revision": 1})
    assert (back["operators"], back["steering"][0]["name"]) == (operators, "kind")
    history = (await bench.call("GET", "routes/nice/history"))["data"]
    assert [revision["operators"] for revision in history] == [operators, operators, {}, operators]


async def test_bad_route_names_are_refused(bench: Bench) -> None:
    assert (await bench.refused("PUT", "routes/-x", 400, json={}))["param"] == "route"
    assert (await bench.refused("PUT", "routes/base", 409, json={}))["param"] == "route"


async def test_a_switch_is_not_written_before_the_engine_holds_the_version(bench: Bench) -> None:
    first = (await add(bench, route="nice"))["version"]
    second = (await add(bench, weight=2.0))["version"]
    bench.engine.error = EngineUnavailableError("restarting")
    await bench.refused("POST", "routes/nice/activate", 503, json={"adapter": "kind"})
    assert (await bench.call("GET", "routes/nice"))["steering"][0]["version"] == first
    bench.engine.error = None
    revision = await bench.call("POST", "routes/nice/activate", json={"adapter": "kind", "comment": "trained"})
    assert (revision["steering"][0]["version"], revision["comment"]) == (second, "trained")


async def test_a_rollback_loads_the_earlier_version_first(bench: Bench) -> None:
    first = (await add(bench, route="nice"))["version"]
    await add(bench, weight=2.0, route="nice")
    bench.engine.error = EngineUnavailableError("restarting")
    await bench.refused("POST", "routes/nice/rollback", 503)
    bench.engine.error = None
    revision = await bench.call("POST", "routes/nice/rollback")  # no body: the one before
    assert (revision["revision"], revision["steering"][0]["version"]) == (3, first)
    assert bench.engine.calls[-1] == ("load", first)
    assert (await bench.call("POST", "routes/nice/rollback", json={"revision": 2}))["revision"] == 4
    await bench.refused("POST", "routes/nice/rollback", 409, json={"revision": 4})
    await bench.refused("POST", "routes/nice/rollback", 400, json={"revision": 0})
    history = (await bench.call("GET", "routes/nice/history"))["data"]
    assert [revision["revision"] for revision in history] == [1, 2, 3, 4]
