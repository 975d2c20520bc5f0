"""`/admin/rewards` and `trimtab rewards` over a real registry and database."""

import json
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, get_args

import anyio.to_thread
import httpx
import pytest
from fastapi import FastAPI

from fake_gateway import serving
from scripted_server import Scripted, ScriptedServer, scripted_server
from trimtab_adapters.contract.rewards import RewardKind
from trimtab_server import cli
from trimtab_server.api.admin.rewards import build_rewards_router
from trimtab_server.commands.rewards import KINDS
from trimtab_server.errors import install_error_handlers
from trimtab_server.rewards.registry import RewardRegistry
from trimtab_server.storage.database import Database
from trimtab_server.storage.reward_specs import SqlRewardSpecs

pytestmark = pytest.mark.anyio

Run = Callable[..., Coroutine[Any, Any, str]]


class Lengths:
    """Answers the JSON contract with the length of the output."""

    def __init__(self) -> None:
        self.override: Any = None

    def __call__(self, path: str, body: Any) -> Any:
        return self.override or {"rewards": [len(item["output"]) for item in body["inputs"]], "version": "7"}


@pytest.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    async with scripted_server(Lengths()) as server:
        yield server


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[FastAPI]:
    database = Database(f"sqlite:///{tmp_path / 'trimtab.db'}")
    database.migrate()
    registry = RewardRegistry(SqlRewardSpecs(database), entry_points=lambda: ())
    app = FastAPI()
    install_error_handlers(app)
    app.include_router(build_rewards_router(registry))
    yield app
    await registry.aclose()
    database.close()


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://gateway/admin") as client:
        yield client


@pytest.fixture
async def run(app: FastAPI, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> AsyncIterator[Run]:
    async with serving(app) as url:
        monkeypatch.setenv("TRIMTAB_URL", url)

        async def run(*arguments: str, status: int = 0) -> str:
            capsys.readouterr()
            found = await anyio.to_thread.run_sync(cli.main, ["rewards", *arguments])
            output = capsys.readouterr()
            assert found == status, output
            return output.err if status else output.out

        yield run


def http_reward(server: ScriptedServer, **options: Any) -> dict[str, Any]:
    return {"name": "length", "kind": "http", "target": server.url, "options": {"api": "json", **options}}


INPUTS = {"inputs": [{"prompt": "p", "output": "abc"}, {"prompt": "p", "output": ""}]}


async def test_a_reward_goes_from_registration_to_removal(client: httpx.AsyncClient, server: ScriptedServer) -> None:
    spec = http_reward(server)
    added = (await client.post("/rewards", json=spec)).json()
    assert added == {**spec, "version": added["version"]}
    assert (await client.get("/rewards")).json()["data"] == [spec]
    scored = (await client.post("/rewards/length/score", json=INPUTS)).json()
    assert scored == {"name": "length", "version": added["version"], "rewards": [3.0, 0.0]}
    shown = (await client.get("/rewards/length")).json()
    assert shown == {
        "object": "reward",
        **spec,
        "version": added["version"],
        "state": {
            "breaker": {"state": "closed", "opened_at": None, "retry_at": None},
            "num_cached": 2,
            "num_cache_hits": 0,
        },
        "error": None,
    }
    assert (await client.delete("/rewards/length")).status_code == 204
    missing = await client.get("/rewards/length")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "reward_not_found")
    assert (await client.delete("/rewards/length")).status_code == 404


async def test_a_server_that_is_away_is_503_with_when_to_ask_again_and_shows_in_the_state(
    client: httpx.AsyncClient, server: ScriptedServer
) -> None:
    await client.post("/rewards", json=http_reward(server, max_retries=0, breaker_threshold=1, cache_size=0))
    server.answer.override = Scripted(503, headers={"Retry-After": "9"})  # type: ignore[attr-defined]
    refused = await client.post("/rewards/length/score", json=INPUTS)
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "9")
    assert refused.json()["error"]["code"] == "reward_unavailable"
    refused = await client.post("/rewards/length/score", json=INPUTS)
    assert "is tried again in 30 s" in refused.json()["error"]["message"]
    assert refused.headers["Retry-After"] == "30"
    breaker = (await client.get("/rewards/length")).json()["state"]["breaker"]
    assert (breaker["state"], breaker["retry_at"]) == ("open", pytest.approx(breaker["opened_at"] + 30.0))


async def test_a_wrong_answer_of_the_server_is_502(client: httpx.AsyncClient, server: ScriptedServer) -> None:
    await client.post("/rewards", json=http_reward(server))
    server.answer.override = {"rewards": [1.0, None], "version": "7"}  # type: ignore[attr-defined]
    refused = await client.post("/rewards/length/score", json=INPUTS)
    assert (refused.status_code, refused.json()["error"]["code"]) == (502, "reward_failed")
    assert "for output 2 of 2" in refused.json()["error"]["message"]


async def test_a_version_that_changes_is_503_and_holds_from_then_on(
    client: httpx.AsyncClient, server: ScriptedServer
) -> None:
    await client.post("/rewards", json=http_reward(server, cache_size=0))
    versions = iter(range(100))
    server.answer = lambda path, body: {
        "rewards": [0.0 for _ in body["inputs"]],
        "version": str(next(versions)),
    }
    refused = await client.post("/rewards/length/score", json=INPUTS)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "reward_changed")
    assert refused.headers["Retry-After"] == "1"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"name": "x", "kind": "magic"}, "kind"),
        ({"name": "x y", "kind": "sentiment"}, "name"),
        ({"name": "x", "kind": "sentiment", "target": "t"}, "target"),
        ({"name": "x", "kind": "sentiment", "options": {"values": "pos"}}, "options.values"),
        ({"name": "x", "kind": "regex", "target": "("}, "target"),
        ({"name": "x", "kind": "json_schema", "options": {"schema": {"type": 3}}}, "options.schema"),
        ({"name": "x", "kind": "http", "target": "http://127.0.0.1:9", "options": {"api": "json"}}, "target"),
        ({"name": "x", "kind": "callable", "target": "nothing"}, "target"),
        ({"name": "x", "kind": "callable", "target": "nothing", "options": {"timeout_s": -1}}, "options.timeout_s"),
    ],
)
async def test_what_cannot_be_used_is_refused_by_name_and_nothing_is_stored(
    client: httpx.AsyncClient, body: dict[str, Any], param: str
) -> None:
    refused = await client.post("/rewards", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param), refused.text
    assert (await client.get("/rewards")).json()["data"] == []


async def test_a_composite_is_registered_shown_and_not_scored(client: httpx.AsyncClient) -> None:
    for name in ("a", "b"):
        await client.post("/rewards", json={"name": name, "kind": "sentiment"})
    spec = {"name": "c", "kind": "composite", "target": "", "options": {"weights": {"a": 0.7, "b": 0.3}}}
    version = (await client.post("/rewards", json=spec)).json()["version"]
    assert (await client.get("/rewards/c")).json()["version"] == version
    refused = await client.post("/rewards/c/score", json=INPUTS)
    assert refused.status_code == 400
    assert "no score for an output alone" in refused.json()["error"]["message"]
    in_use = await client.delete("/rewards/a")
    assert (in_use.status_code, in_use.json()["error"]["type"]) == (409, "conflict_error")
    unknown = await client.post("/rewards", json={**spec, "options": {"weights": {"a": 1.0, "z": 1.0}}})
    assert unknown.status_code == 404
    assert "known rewards: a, b, c" in unknown.json()["error"]["message"]


async def test_the_command_adds_shows_scores_and_removes_every_kind(
    run: Run, server: ScriptedServer, tmp_path: Path
) -> None:
    line = await run(
        *("add", "length", "--kind", "http", "--target", server.url),
        *("--option", "api=json", "--option", "max_batch_size=2"),
    )
    assert line.startswith("length version ")
    await run("add", "mood", "--kind", "sentiment")
    await run("add", "form", "--kind", "json_schema", "--option", 'schema={"type": "object", "required": ["a"]}')
    await run("add", "words", "--kind", "keywords", "--option", 'keywords=["dog", "ball"]')
    await run("add", "polite", "--kind", "regex", "--target", "please|thank")
    await run("add", "both", "--kind", "composite", "--option", 'weights={"words": 0.5, "polite": 0.5}')
    table = await run("list")
    assert [row.split()[0] for row in table.splitlines()[1:]] == ["both", "form", "length", "mood", "polite", "words"]
    assert await run("score", "words", "--output", "Dogs!", "--output", "a dog, a ball") == "0.5\n1\n"
    file = tmp_path / "texts.jsonl"
    file.write_text('{"prompt": "p", "output": "abcd"}\n\n{"prompt": "p", "output": ""}\n')
    scored = json.loads(await run("score", "length", "--output", "ab", "--file", str(file), "--json"))
    assert scored["rewards"] == [2.0, 4.0, 0.0]
    assert json.loads(await run("show", "length"))["state"]["num_cached"] == 3
    assert "a part of both" in await run("remove", "words", status=1)
    assert await run("remove", "both") == "both is removed\n"
    assert await run("remove", "words") == "words is removed\n"


async def test_the_command_says_what_is_wrong(run: Run, tmp_path: Path) -> None:
    assert "options.value" in await run("add", "m", "--kind", "sentiment", "--option", "value=mood", status=1)
    assert "nothing to judge" in await run("score", "m", status=1)
    assert "does not exist" in await run("score", "m", "--output", "x", status=1)
    (tmp_path / "bad").write_text("no json")
    assert "cannot be read" in await run("score", "m", "--file", str(tmp_path / "bad"), status=1)


def test_the_command_knows_all_kinds() -> None:
    assert get_args(RewardKind) == KINDS
