"""`/admin/calibrators` and `trimtab calibrate` over a real database and the fake engine."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio.to_thread
import httpx
import pytest
from fastapi import FastAPI

from fake_gateway import MemoryCatalog, asgi_client, serving
from trimtab_adapters.contract.errors import NotFoundError, RewardError
from trimtab_adapters.contract.rewards import RewardChoice, RewardInput
from trimtab_adapters.contract.rollout_filter import RolloutFilter
from trimtab_server import cli
from trimtab_server.api.admin.calibrators import Calibrators, build_calibrators_router
from trimtab_server.calibration.fitting import CalibratorFitting
from trimtab_server.decoding.reference import ReferenceCalibrators
from trimtab_server.engine.fake import FakeEngine
from trimtab_server.errors import install_error_handlers
from trimtab_server.rewards.resolved import ResolvedReward
from trimtab_server.storage.calibrators import SqlCalibratorStore, SqlPooledCalibratorStore
from trimtab_server.storage.database import Database
from trimtab_server.storage.identified_log import IdentifiedRolloutLog
from trimtab_server.storage.reference_samples import SqlSampleLog
from trimtab_server.storage.rollout_log import SpooledRolloutLog
from trimtab_server.storage.rollouts import SqlRolloutReader

pytestmark = pytest.mark.anyio

PROMPTS = [f"prompt {number}" for number in range(25)]
SETTINGS = {"max_tokens": 4, "temperature": 0.5}


class SumReward:
    """The sum of the output's characters: hardly ever a tie. Waits for `gate`."""

    name = "sum"

    def __init__(self) -> None:
        self.version = "1"
        self.error: RewardError | None = None
        self.gate: asyncio.Event | None = None
        self.num_scored = 0

    async def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        self.num_scored += len(inputs)
        return [float(sum((place + 1) * ord(c) for place, c in enumerate(item.output))) for item in inputs]


class LengthReward:
    """The length of the output without repeated characters."""

    name = "variety"
    version = "5"

    async def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        return [float(len(set(item.output))) for item in inputs]


@dataclass
class Desk:
    """The API's client and handles on its parts."""

    app: FastAPI
    client: httpx.AsyncClient
    engine: FakeEngine
    reader: SqlRolloutReader
    flush: Callable[[], Coroutine[Any, Any, None]]
    reward: SumReward = field(default_factory=SumReward)
    rewards: dict[str, SumReward] = field(default_factory=dict)

    async def batched(self, name: str) -> SumReward:
        if name not in self.rewards:
            raise NotFoundError(f"the reward {name!r} does not exist", param="reward", code="reward_not_found")
        return self.rewards[name]

    async def resolve(self, choice: RewardChoice) -> ResolvedReward:
        if choice == "mix":
            return ResolvedReward("mix", "1", (self.reward, LengthReward()), "min", (0.5, 0.5))
        reward = await self.batched(str(choice))
        return ResolvedReward(reward.name, reward.version, (reward,))

    async def call(self, verb: str, path: str = "", expected: int = 200, **body: Any) -> Any:
        response = await self.client.request(verb, f"/admin/calibrators{path}", json=body or None)
        assert response.status_code == expected, response.text
        return response.json() if response.content else None

    async def fit(self, expected: int = 200, **changes: Any) -> Any:
        body = {"reward": "sum", "model": "base", "prompts": PROMPTS, "samples": 4, "request": SETTINGS, **changes}
        return await self.call("POST", "", expected, **body)

    async def refused(self, status: int, **changes: Any) -> dict[str, Any]:
        error = (await self.fit(status, **changes))["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return dict(error)


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    database = Database(f"sqlite:///{tmp_path / 'trimtab.db'}")
    database.migrate()
    log = SpooledRolloutLog(database, tmp_path / "spool", linger_s=60.0)
    await log.start()
    engine, app = FakeEngine(), FastAPI()
    identity = (await engine.status()).base_identity
    scores, pooled, samples = SqlCalibratorStore(database), SqlPooledCalibratorStore(database), SqlSampleLog(database)
    async with asgi_client(app) as client:
        desk = Desk(app, client, engine, SqlRolloutReader(database), log.flush)
        desk.rewards["sum"] = desk.reward
        fitting = CalibratorFitting(
            engine,
            desk,
            ReferenceCalibrators(scores, samples),
            samples,
            pooled,
            IdentifiedRolloutLog(log, lambda: identity),
        )
        calibrators = Calibrators(fitting=fitting, scores=scores, pooled=pooled, base_identity=lambda: identity)
        app.include_router(build_calibrators_router(calibrators, desk, MemoryCatalog(), log.flush))
        install_error_handlers(app)
        yield desk
    await log.aclose()
    database.close()


async def test_a_pooled_calibrator_is_fitted_from_fresh_samples_listed_shown_and_deleted(desk: Desk) -> None:
    fitted = await desk.fit()
    assert fitted["id"].startswith("cal-")
    assert (fitted["object"], fitted["method"], fitted["reward"], fitted["status"]) == (
        "calibrator",
        "pooled",
        "sum@1",
        "fresh",
    )
    assert (fitted["base_model"], fitted["endpoint"], fitted["request"]) == ("base", "completions", SETTINGS)
    status = await desk.engine.status()
    assert fitted["base_identity"] == status.base_identity
    moved = status.model_copy(update={"model": "/elsewhere"})
    changed = status.model_copy(update={"vocabulary_sha256": "1" * 64})
    assert len({status.base_identity, moved.base_identity, changed.base_identity}) == 3
    assert "elsewhere" not in moved.base_identity, "callers see it"
    held_out = fitted["held_out"]
    # 25 prompts of 4: a fifth chose, a fifth was held out, the rest fitted.
    assert (fitted["num_prompts"], fitted["num_rollouts"]) == (20, 80)
    assert (held_out["num_prompts"], held_out["num_rollouts"], len(held_out["values"])) == (5, 20, 5)
    assert held_out["model"] in held_out["pinball"]
    assert 0 < fitted["error"] < 1
    everything = (await desk.call("GET"))["data"]
    # Sampling the prompts made a calibrator for each of them on the way.
    assert [(one["method"], one["num_prompts"], one["num_rollouts"]) for one in everything] == [
        ("pooled", 20, 80),
        ("reference", 25, 100),
    ]
    shown = await desk.call("GET", f"/{fitted['id']}")
    assert "values" not in shown["held_out"]
    assert shown == everything[0]
    for one in everything:
        await desk.call("DELETE", f"/{one['id']}", 204)
    assert (await desk.call("GET"))["data"] == []
    await desk.call("GET", f"/{fitted['id']}", 404)
    await desk.call("DELETE", f"/{fitted['id']}", 404)


async def test_what_is_drawn_is_unsteered_unseeded_and_logged_and_serves_the_next_fit(desk: Desk) -> None:
    await desk.fit(model="kind")
    assert len(desk.engine.observed.requests) == 100
    for request in desk.engine.observed.requests:
        assert request.steering is None
        assert "seed" not in request.body
        assert request.body["temperature"] == 0.5
    await desk.flush()
    logged = [rollout async for rollout in desk.reader.read(RolloutFilter())]
    assert {rollout.endpoint for rollout in logged} == {"reference"}
    assert len(logged) == len({rollout.id for rollout in logged}) == 100
    fitted = await desk.fit(prompts=[], from_log=True, request=None)
    assert (fitted["num_rollouts"], fitted["request"]) == (80, SETTINGS)
    assert len(desk.engine.observed.requests) == 100


async def test_logged_samples_are_added_to_drawn_ones_and_none_counts_twice(desk: Desk) -> None:
    await desk.fit()
    fitted = await desk.fit(prompts=[*PROMPTS[:5], *(f"new {i}" for i in range(5)), "new 0"], from_log=True)
    # 25 old prompts, of which 5 are asked for again, and 5 new ones.
    assert fitted["num_prompts"] == 30 - 6
    # A sixth of them held out: 6 prompts, 4 rollouts each, and the one that told the prompt's ids anew is not added.
    assert fitted["held_out"]["num_rollouts"] == 24


async def test_calibrators_for_each_prompt_are_made_and_judged_one_rollout_left_out(desk: Desk) -> None:
    fitted = await desk.fit(method="reference", prompts=PROMPTS[:6], samples=5)
    assert (fitted["id"], fitted["method"], fitted["num_prompts"], fitted["num_rollouts"]) == (None, "reference", 6, 30)
    assert (fitted["held_out"]["num_prompts"], fitted["held_out"]["num_rollouts"]) == (6, 30)
    (group,) = (await desk.call("GET"))["data"]
    assert (group["method"], group["num_prompts"], group["num_rollouts"]) == ("reference", 6, 30)


async def test_a_mix_has_calibrators_for_each_prompt_and_no_pooled_one(desk: Desk) -> None:
    fitted = await desk.fit(method="reference", reward="mix", prompts=PROMPTS[:3])
    assert (fitted["reward"], fitted["num_rollouts"]) == ("sum@1, variety@5", 12)
    # All rollouts of one prompt together have mean ½, so that the shares below and above ½ balance.
    assert 0 < fitted["held_out"]["ks_distance_of_all"] < 0.5
    assert "is a mix" in (await desk.refused(400, reward="mix"))["message"]


async def test_chat_prompts_are_sampled_as_chats(desk: Desk) -> None:
    messages = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    fitted = await desk.fit(prompts=messages)
    assert fitted["endpoint"] == "chat.completions"
    assert {request.endpoint for request in desk.engine.observed.requests} == {"chat.completions"}


async def test_calibrators_are_stale_when_the_reward_changes_or_goes(desk: Desk) -> None:
    fitted = await desk.fit()
    desk.reward.version = "2"
    shown = await desk.call("GET", f"/{fitted['id']}")
    assert (shown["status"], shown["stale_because"]) == ("stale", ["reward version: '1', not '2'"])
    assert {one["status"] for one in (await desk.call("GET"))["data"]} == {"stale"}
    desk.rewards.clear()
    shown = await desk.call("GET", f"/{fitted['id']}")
    assert shown["stale_because"] == ["the reward 'sum' is gone"]


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"prompts": []}, "prompts", "nothing to fit"),
        ({"prompts": PROMPTS[:19]}, "prompts", "at least 20 prompts"),
        ({"prompts": ["text", [{"role": "user", "content": "x"}]]}, "prompts", "completions have texts"),
        ({"prompts": [""]}, "prompt", "must not be empty"),
        ({"samples": 2}, "samples", "at least 3"),
        ({"samples": 1024}, "samples", "more than the 20000 rollouts"),
        ({"request": {"seed": 1}}, "request.seed", "cannot be set there"),
        ({"request": {"steering": {}}}, "request.steering", "cannot be set there"),
        ({"request": {"temperature": 9}}, "temperature", "above maximum"),
        ({"request": {"temprature": 1}}, "temprature", "Unrecognized"),
        ({"reward": ""}, "reward", "at least 1 character"),
        ({"method": "guess"}, "method", "Supported values"),
        ({"method": "reference", "prompts": [], "from_log": True}, "prompts", "for each of 'prompts'"),
    ],
    ids=str,
)
async def test_what_cannot_be_fitted_is_refused(desk: Desk, changes: dict[str, Any], param: str, message: str) -> None:
    error = await desk.refused(400, **changes)
    assert error["param"] == param
    assert message in error["message"]


async def test_an_unknown_reward_or_model_or_an_empty_log_is_not_found(desk: Desk) -> None:
    assert (await desk.refused(404, reward="nope"))["code"] == "reward_not_found"
    assert (await desk.refused(404, model="nope"))["code"] == "model_not_found"
    assert (await desk.refused(404, prompts=[], from_log=True, request=None))["code"] == "samples_not_found"


async def test_a_reward_that_fails_fails_the_fit_and_nothing_is_kept(desk: Desk) -> None:
    desk.reward.error = RewardError("the judge is away")
    assert "the judge is away" in (await desk.refused(502))["message"]
    assert (await desk.call("GET"))["data"] == []
    desk.reward.error = None
    await desk.fit()


async def test_a_second_fit_at_the_same_time_is_a_conflict(desk: Desk) -> None:
    desk.reward.gate = asyncio.Event()
    first = asyncio.create_task(desk.fit())
    while not desk.engine.observed.requests:
        await asyncio.sleep(0.01)
    async with asyncio.timeout(60):  # one that waits for the first would wait for ever
        assert (await desk.refused(409))["code"] == "calibration_busy"
    desk.reward.gate.set()
    await first


Run = Callable[..., Coroutine[Any, Any, str]]


@pytest.fixture
async def run(desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> AsyncIterator[Run]:
    async with serving(desk.app) as url:
        monkeypatch.setenv("TRIMTAB_URL", url)

        async def run(*arguments: str, status: int = 0) -> str:
            capsys.readouterr()
            found = await anyio.to_thread.run_sync(cli.main, list(arguments))
            output = capsys.readouterr()
            assert found == status, output
            return output.err if status else output.out

        yield run


async def test_the_command_fits_prints_writes_and_plots(run: Run, tmp_path: Path) -> None:
    prompts, plot, report = tmp_path / "prompts.jsonl", tmp_path / "plot.png", tmp_path / "report.json"
    prompts.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in PROMPTS) + "\n\n")
    printed = await run(
        *("calibrate", "--reward", "sum", "--route", "kind", "--prompts", str(prompts), "--samples", "4"),
        *("--request", json.dumps(SETTINGS), "--plot", str(plot), "--json", str(report)),
    )
    fitted = json.loads(report.read_text())
    held_out = fitted["held_out"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    lines = {line.split()[0]: line for line in printed.splitlines()}
    assert lines["calibrator"] == f"calibrator  {fitted['id']}, pooled, of sum@1 on base"
    assert lines["made"] == "made from   80 rollouts of 20 prompts"
    assert lines["held"] == "held out    20 rollouts of 5 prompts"
    # Kolmogorov's distance for n = 5 at 5 %: .56328 (Miller 1956)
    assert f"KS distance {held_out['ks_distance']:.3f}, critical value 0.563 at 5 % for n = 5" in lines["uniform"]
    assert lines["nominal"].split()[1:] == [f"0.{i}0" for i in range(1, 10)]
    assert lines["measured"].split()[1:] == [f"{measured:.3f}" for _, measured in held_out["coverage"]]
    listed = await run("calibrators", "list")
    assert fitted["id"] in listed
    assert json.loads(await run("calibrators", "show", fitted["id"]))["id"] == fitted["id"]
    assert await run("calibrators", "delete", fitted["id"]) == f"{fitted['id']} is deleted\n"
    again = await run("calibrate", "--reward", "sum", "--model", "base", "--rollouts-from-log")
    assert "made from   80 rollouts of 20 prompts" in again


@pytest.mark.parametrize(
    ("lines", "arguments", "message"),
    [
        ("not json", [], "line 1: not JSON"),
        ('{"prompt": "x"}\n{"text": "x"}', [], "line 2: not"),
        ("", [], "has no prompts"),
        (None, [], "cannot be read"),
        ('{"prompt": "x"}', ["--request", "hot"], "--request is not JSON"),
        ('{"prompt": "x"}', ["--request", "[]"], "must be an object"),
        ('{"prompt": "x"}', [], "at least 20 prompts"),
    ],
)
async def test_the_command_says_what_is_wrong(
    run: Run, tmp_path: Path, lines: str | None, arguments: list[str], message: str
) -> None:
    path = tmp_path / "prompts.jsonl"
    if lines is not None:
        path.write_text(lines)
    told = await run("calibrate", "--reward", "sum", "--model", "base", "--prompts", str(path), *arguments, status=1)
    assert message in told
