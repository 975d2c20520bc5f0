"""`/admin/training-jobs` and `/admin/training-schedules` over HTTP, and the commands on top of them."""

import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from fake_gateway import serving
from trimtab_server import cli
from turning_log import rollout

pytestmark = pytest.mark.anyio

Bench = Any
Run = Callable[..., Coroutine[Any, Any, str]]


@pytest.fixture
async def run(bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> AsyncIterator[Run]:
    """Runs one command against the gateway and returns what it printed."""
    monkeypatch.setenv("TRIMTAB_ADMIN_KEY", "admin-secret")
    async with serving(bench.app) as url:
        monkeypatch.setenv("TRIMTAB_URL", url)

        async def run(*arguments: str, status: int = 0) -> str:
            capsys.readouterr()
            found = await anyio.to_thread.run_sync(cli.main, list(arguments))
            output = capsys.readouterr()
            assert found == status, output
            return output.err if status else output.out

        yield run


async def claimed(bench: Bench) -> str:
    job = await bench.call("POST", "training-jobs", json={"config": {"steps": 3}})
    found = await bench.call("POST", "training-jobs/claim", json={"worker": "w"})
    assert (found["id"], found["attempt"], found["lease_s"]) == (job["id"], 1, 120.0)
    return str(job["id"])


def beat(*numbers: int) -> dict[str, Any]:
    figures = {"train/loss": 0.5, "train/kl": None}
    return {
        "worker": "w",
        "attempt": 1,
        "progress": {"step": max(numbers)},
        "log": [{"number": number, "text": f"line {number}"} for number in numbers],
        "metrics": [{"number": n, "step": n, "time": 1.0, "figures": figures} for n in numbers],
    }


async def test_the_log_and_the_metrics_of_a_running_job_are_shown(bench: Bench) -> None:
    job = await claimed(bench)
    assert (await bench.call("POST", f"training-jobs/{job}/heartbeat", json=beat(1, 2, 3)))["progress"] == {"step": 3}
    log = await bench.call("GET", f"training-jobs/{job}/log?tail=2")
    assert log["data"] == [{"attempt": 1, "number": n, "text": f"line {n}"} for n in (2, 3)]
    metrics = await bench.call("GET", f"training-jobs/{job}/metrics?tail=1")
    assert metrics["data"] == [
        {"attempt": 1, "number": 3, "step": 3, "time": 1.0, "figures": {"train/loss": 0.5, "train/kl": None}}
    ]
    for path in (f"training-jobs/{job}/log?tail=0", f"training-jobs/{job}/metrics?tail=2001"):
        await bench.refused("GET", path, 400)
    await bench.refused("GET", "training-jobs/job-x/log", 404)


async def test_a_heartbeat_beyond_its_bounds_is_refused(bench: Bench) -> None:
    job = await claimed(bench)
    line = {"number": 1, "text": "x"}
    for change in (
        {"log": [line] * 1001},
        {"log": [{"number": 1, "text": "x" * 4001}]},
        {"log": [{"number": 0, "text": "x"}]},
        {"metrics": [{"number": 1, "step": 1, "time": 1.0, "figures": {str(n): 0.0 for n in range(201)}}]},
        {"attempt": None, "log": [line], "metrics": []},
    ):
        await bench.refused("POST", f"training-jobs/{job}/heartbeat", 400, json={**beat(1), **change})
    assert (await bench.call("GET", f"training-jobs/{job}/log"))["data"] == []


async def test_an_old_worker_that_knows_no_attempts_is_served(bench: Bench) -> None:
    job = await claimed(bench)
    await bench.call("POST", f"training-jobs/{job}/heartbeat", json={"worker": "w", "progress": {}})
    await bench.call("POST", f"training-jobs/{job}/finish", json={"worker": "w", "state": "succeeded"})


async def test_a_released_job_waits_again(bench: Bench) -> None:
    job = await claimed(bench)
    released = await bench.call("POST", f"training-jobs/{job}/release", json={"worker": "w", "attempt": 1})
    assert released["state"] == "queued"
    error = await bench.refused(
        "POST", f"training-jobs/{job}/heartbeat", 409, json={"worker": "w", "attempt": 1, "progress": {}}
    )
    assert "queued, not running" in error["message"]


async def test_the_commands_show_metrics_and_the_end_of_a_log(bench: Bench, run: Run) -> None:
    job = await claimed(bench)
    assert await run("jobs", "metrics", job) == ""
    await bench.call("POST", f"training-jobs/{job}/heartbeat", json=beat(1, 2, 3))
    assert await run("jobs", "log", job, "--tail", "2") == "line 2\nline 3\n"
    rows = [line.split() for line in (await run("jobs", "metrics", job)).splitlines()]
    assert rows == [["STEP", "train/loss", "train/kl"], *([str(n), "0.5", "-"] for n in (1, 2, 3))]
    assert [line["step"] for line in json.loads(await run("jobs", "metrics", job, "--json", "--tail", "2"))] == [2, 3]


async def test_a_followed_log_shows_each_line_once_and_ends_with_the_job(
    bench: Bench, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await claimed(bench)
    await bench.call("POST", f"training-jobs/{job}/heartbeat", json=beat(1, 2))
    looked = threading.Semaphore(0)
    monkeypatch.setattr(time, "sleep", lambda seconds: looked.release())
    printed: list[str] = []

    async def follow() -> None:
        printed.append(await run("jobs", "log", job, "--follow", "--tail", "1"))

    async with anyio.create_task_group() as group:
        group.start_soon(follow)
        assert await anyio.to_thread.run_sync(lambda: looked.acquire(timeout=30))
        await bench.call("POST", f"training-jobs/{job}/heartbeat", json=beat(2, 3))
        assert await anyio.to_thread.run_sync(lambda: all(looked.acquire(timeout=30) for _ in range(3)))
        await bench.call("POST", f"training-jobs/{job}/heartbeat", json=beat(4))
        await bench.call("POST", f"training-jobs/{job}/finish", json={"worker": "w", "state": "succeeded"})
    assert printed == ["line 2\nline 3\nline 4\n"]


SCHEDULE: dict[str, Any] = {
    "name": "nightly",
    "config": {"steps": 3},
    "route": "base",
    "every": {"new_rollouts": 5},
}


async def test_a_schedule_is_added_posts_its_job_is_paused_and_deleted(bench: Bench) -> None:
    added = await bench.call("POST", "training-schedules", json=SCHEDULE)
    assert (added["every"], added["drift"], added["is_running"]) == ({"new_rollouts": 5, "hours": None}, None, False)
    error = await bench.refused("POST", "training-schedules", 409, json=SCHEDULE)
    assert "already" in error["message"]
    assert await bench.scheduler.look() == []
    await bench.log.append([rollout(f"r{n}", n, created_at=4e9 + n, finish_reason="stop") for n in range(5)])
    await bench.log.flush()
    (job,) = await bench.scheduler.look()
    shown = await bench.call("GET", "training-schedules/nightly")
    assert shown["is_running"]
    assert [(run["job_id"], run["state"]) for run in shown["runs"]] == [(job, "queued")]
    assert shown["runs"][0]["reason"] == {"new_rollouts": {"is_due": True, "num": 5}}
    assert (await bench.call("GET", f"training-jobs/{job}"))["config"] == {"steps": 3}
    assert (await bench.call("POST", "training-schedules/nightly/pause"))["is_paused"]
    assert not (await bench.call("POST", "training-schedules/nightly/resume"))["is_paused"]
    assert [item["name"] for item in (await bench.call("GET", "training-schedules"))["data"]] == ["nightly"]
    assert await bench.call("DELETE", "training-schedules/nightly", 204) is None
    await bench.refused("GET", "training-schedules/nightly", 404)
    assert (await bench.call("GET", f"training-jobs/{job}"))["state"] == "queued"


@pytest.mark.parametrize(
    "change",
    [
        {"every": None},
        {"every": {}},
        {"every": {"new_rollouts": 5, "hours": 1.0}},
        {"every": {"new_rollouts": 0}},
        {"every": {"hours": 0}},
        {"every": {"hours": 1.0, "surprise": 1}},
        {"route": None},
        {"every": None, "drift": {"reward": "kindness", "window": 29}},
        {"every": None, "drift": {"reward": "kindness", "false_alarm": 0.6}},
        {"route": None, "every": None, "drift": {"reward": "kindness"}},
        {"name": "../x"},
        {"config": {}},
        {"surprise": 1},
    ],
)
async def test_a_schedule_that_makes_no_sense_is_refused(bench: Bench, change: dict[str, Any]) -> None:
    await bench.refused("POST", "training-schedules", 400, json={**SCHEDULE, **change})
    assert (await bench.call("GET", "training-schedules"))["data"] == []


async def test_schedules_from_the_command_line(bench: Bench, run: Run, tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text("steps = 2\n")
    assert await run("schedules", "add", "often", str(config), "--hours", "0.5") == "often: every 0.5 h\n"
    line = await run(
        *("schedules", "add", "drifts", str(config), "--route", "kind", "--new-rollouts", "500"),
        *("--drift-reward", "kindness", "--drift-window", "50", "--drift-false-alarm", "0.01"),
    )
    assert line == "drifts: after 500 rollouts of kind, when kindness of kind falls\n"
    shown = json.loads(await run("schedules", "show", "drifts"))
    assert shown["drift"] == {"reward": "kindness", "window": 50, "false_alarm": 0.01}
    assert shown["config"] == {"steps": 2}
    await run("schedules", "pause", "often")
    rows = (await run("schedules", "list")).splitlines()
    assert [row.split()[:2] for row in rows[1:]] == [["drifts", "waiting"], ["often", "paused"]]
    await run("schedules", "resume", "often")
    await run("schedules", "delete", "drifts")
    assert [item["name"] for item in json.loads(await run("schedules", "list", "--json"))] == ["often"]
    assert "either new_rollouts or hours" in await run(
        "schedules", "add", "x", str(config), "--route", "r", "--hours", "1", "--new-rollouts", "1", status=1
    )
    assert "does not exist" in await run("schedules", "delete", "drifts", status=1)
