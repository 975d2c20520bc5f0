import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trimtab_training import cli
from trimtab_training.gateway import GatewayClient

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def config_file(make_config: Any, tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(make_config(steps=3, reward={"name": "demo-kindness"}).model_dump_json())
    return path


def test_a_run_from_a_file_prints_the_comparison_and_the_version(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.train(["--config", str(config_file), "--set", "steps=2"]) == 0
    out = capsys.readouterr().out
    assert "mean reward" in out
    (version,) = (tmp_path / "run/versions").iterdir()
    assert version.name in out
    assert cli.train(["--config", str(config_file), "--set", "steps=2"]) == 1
    assert "holds a run already" in capsys.readouterr().err
    assert cli.train(["--config", str(config_file), "--set", "steps=2", "--resume"]) == 0


def test_bad_input_is_one_line_on_standard_error_and_a_status(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.train(["--config", str(tmp_path / "none.toml")]) == 1
    assert "cannot be read" in capsys.readouterr().err
    assert cli.train(["--config", str(config_file), "--set", "setps=3"]) == 1
    assert "setps" in capsys.readouterr().err
    assert cli.train([]) == 2
    assert cli.train(["--help"]) == 0


def test_a_trainer_without_a_gateway_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing(GatewayClient):
        def __init__(self, url: str, **settings: Any) -> None:
            super().__init__(url, **{**settings, "retry_for_s": 0.0})

    monkeypatch.setattr(cli, "GatewayClient", Refusing)
    assert cli.trainer(["--url", "http://127.0.0.1:9", "--output-dir", str(tmp_path), "--once"]) == 1
    assert "did not answer" in capsys.readouterr().err


def test_a_trainer_runs_a_waiting_job_to_its_end(
    gateway: Any, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "GatewayClient", lambda url, **settings: gateway.client(admin_key=settings["admin_key"]))
    config = json.loads(config_file.read_text())
    gateway.jobs = [{"id": "job-7", "state": "running", "config": {**config, "steps": 2}}]
    status = cli.trainer(
        ["--url", "http://gateway", "--admin-key", "k", "--worker", "w", "--output-dir", str(tmp_path / "o"), "--once"]
    )
    assert status == 0
    assert gateway.finished[0]["state"] == "succeeded"
    assert gateway.finished[0]["version"] in gateway.versions
    assert (tmp_path / "o/job-7/metrics.jsonl").exists()
    assert {key for key, _, _ in gateway.requests} == {"Bearer k"}


def test_sigterm_writes_a_checkpoint_from_which_the_run_goes_on(config_file: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "import sys; from trimtab_training.cli import train; sys.exit(train(sys.argv[1:]))",
        *("--config", str(config_file), "--set", "steps=1000000", "--set", "num_threads=1"),
    ]
    paths = os.pathsep.join(str(REPOSITORY / name) for name in ("server", "adapters", "training"))
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths})
    assert process.stderr is not None
    metrics = tmp_path / "run/metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and "train/loss" in metrics.read_text()):
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "--resume" in errors
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    assert json.loads((checkpoint / "state.json").read_text())["step"] > 0


def test_the_commands_load_nothing_heavy_before_arguments_are_parsed() -> None:
    code = (
        "import sys; from trimtab_training import cli; cli.train(['--help']); cli.trainer(['--help']);"
        "sys.exit(sorted({'torch', 'transformers', 'trimtab_server', 'tensorboard'} & set(sys.modules)) or 0)"
    )
    paths = os.pathsep.join(str(REPOSITORY / name) for name in ("server", "adapters", "training"))
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, capture_output=True)
    assert done.returncode == 0, done.stderr
