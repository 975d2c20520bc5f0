"""Training in several processes that are really started, each in an interpreter of its own. No engine is needed."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from trimtab_adapters.contract.errors import ProcessLostError
from trimtab_training import launching
from trimtab_training.launching import launched
from trimtab_training.recipes.train import train
from trimtab_training.rewards import Scorer


def test_one_that_is_killed_is_named_and_the_run_does_not_hang(
    make_config: Any, lucky_scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(processes=2, steps=100_000, num_threads=1)
    followers = kept_followers(monkeypatch)

    def report(progress: Any) -> None:
        if progress["step"] == 3:
            os.kill(followers[0].pid, signal.SIGKILL)

    with (
        pytest.raises(ProcessLostError, match=r"process 1, id \d+: exit status -9"),
        launched(config) as processes,
    ):
        train(config, scorer=lucky_scorer, processes=processes, report=report)
    assert followers[0].status(0) == -signal.SIGKILL


def test_the_others_end_with_the_first_even_when_it_is_killed(
    make_config: Any, lucky_scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(processes=2, steps=100_000, num_threads=1)
    pid_file = tmp_path / "pid"

    def first() -> None:
        followers = kept_followers(monkeypatch)

        def report(progress: Any) -> None:
            if progress["step"] == 2:
                pid_file.write_text(str(followers[0].pid))
                os.kill(os.getpid(), signal.SIGKILL)

        with launched(config) as processes:
            train(config, scorer=lucky_scorer, processes=processes, report=report)

    process = multiprocessing.get_context("fork").Process(target=first)
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while not is_gone(int(pid_file.read_text())):
        assert time.monotonic() < deadline, "the second process outlived the first"
        time.sleep(0.1)


def test_one_that_cannot_start_is_an_error(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ProcessLostError, match=r"process 1 did not start"), launched(make_config(processes=2)):
        pytest.fail("nobody is there")


def test_a_signal_stops_all_processes_of_the_command_with_a_checkpoint(make_config: Any, tmp_path: Path) -> None:
    config = make_config(steps=1_000_000, reward={"name": "demo-kindness"}, num_threads=1)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    code = "import sys; from trimtab_training.cli import train; sys.exit(train(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--config", str(tmp_path / "config.json"), "--processes", "2"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    metrics = config.output_dir / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and "train/loss" in metrics.read_text()):
        time.sleep(0.1)
    (child,) = (child.pid for child in psutil.Process(process.pid).children())
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "--resume" in errors
    assert is_gone(child)
    (checkpoint,) = (config.output_dir / "checkpoints").iterdir()
    assert json.loads((checkpoint / "state.json").read_text())["step"] > 0


def kept_followers(monkeypatch: pytest.MonkeyPatch) -> list[launching.Follower]:
    followers: list[launching.Follower] = []

    class Kept(launching.Follower):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            followers.append(self)

    monkeypatch.setattr(launching, "Follower", Kept)
    return followers


def is_gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
