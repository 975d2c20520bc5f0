import asyncio
import os
import sys
from pathlib import Path

import psutil
import pytest

from trimtab_server.supervisor import EngineSupervisor

LIVES_WITH_A_CHILD = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[1], "a").write(str(child.pid) + "\\n")
{ending}
"""


def script(tmp_path: Path, ending: str) -> list[str]:
    path = tmp_path / "engine.py"
    path.write_text(LIVES_WITH_A_CHILD.format(ending=ending))
    return [sys.executable, str(path), str(tmp_path / "pids")]


def pids(tmp_path: Path) -> list[int]:
    path = tmp_path / "pids"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


async def until(condition: "object", *, poll_s: float = 0.01) -> None:
    assert callable(condition)
    while not condition():
        await asyncio.sleep(poll_s)


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def run(coroutine: "object") -> None:
    asyncio.run(asyncio.wait_for(coroutine, 60))  # type: ignore[arg-type]


def supervisor(tmp_path: Path, ending: str, stop_grace_s: float = 20.0) -> EngineSupervisor:
    async def is_ready() -> bool:
        return bool(pids(tmp_path))

    return EngineSupervisor(
        script(tmp_path, ending),
        is_ready,
        log_path=tmp_path / "log",
        first_backoff_s=0.01,
        max_backoff_s=0.04,
        stop_grace_s=stop_grace_s,
        poll_s=0.01,
    )


def test_stopping_leaves_neither_the_engine_nor_its_children(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = supervisor(tmp_path, "time.sleep(600)")
        task = asyncio.create_task(engine.run())
        await until(lambda: engine.state == "ready")
        leader, (child,) = engine.pid, pids(tmp_path)
        assert leader is not None
        assert os.getpgid(leader) != os.getpgid(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.state == "stopped"
        await until(lambda: not is_running(child))
        assert not is_running(leader)

    run(scenario())


def test_an_engine_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    async def scenario() -> None:
        ending = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
        engine = supervisor(tmp_path, ending, stop_grace_s=0.3)
        task = asyncio.create_task(engine.run())
        await until(lambda: engine.state == "ready")
        await asyncio.sleep(0.3)  # the handler is installed right after the pid is written
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.last_exit == -9

    run(scenario())


def test_a_dead_engine_is_restarted_with_growing_pauses_and_its_children_are_killed(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = supervisor(tmp_path, "sys.exit(3)")
        task = asyncio.create_task(engine.run())
        await until(lambda: engine.num_restarts >= 4)
        assert engine.last_exit == 3
        assert engine._backoff_s == 0.04
        assert engine.retry_after_s >= 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for child in pids(tmp_path):
            await until(lambda child=child: not is_running(child))

    run(scenario())


def test_a_killed_engine_comes_back_ready(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = supervisor(tmp_path, "time.sleep(600)")
        task = asyncio.create_task(engine.run())
        await until(lambda: engine.state == "ready")
        first = engine.pid
        assert first is not None
        os.kill(first, 9)
        await until(lambda: engine.pid not in (None, first) and engine.state == "ready")
        assert engine.num_restarts == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(scenario())
