import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from trimtab_training.config import parse_config
from trimtab_training.demo import run, world
from trimtab_training.demo.processes import PREFIX_ROOM, Child
from trimtab_training.demo.tiny_lm import DemoModels

STUB = str(Path(__file__).with_name("stub_gateway.py"))
MODELS = DemoModels(Path("/models/base"), Path("/models/adapter"), 1.0, 1.0)


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[Child]:
    """The demonstration with stubs for children; all that were started."""
    started: list[Child] = []
    init = Child.__init__

    def remember(self: Child, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        started.append(self)

    monkeypatch.setattr(Child, "__init__", remember)
    monkeypatch.setattr(run.Demo, "_build_models", lambda _: MODELS)
    monkeypatch.setattr(run, "serve_command", lambda *, port, **_: [sys.executable, STUB, "serve", str(port)])
    _set_trainer(monkeypatch, "succeeded")
    return started


def _set_trainer(monkeypatch: pytest.MonkeyPatch, outcome: str) -> None:
    monkeypatch.setattr(run, "trainer_command", lambda *, url, **_: [sys.executable, STUB, "trainer", url, outcome])


def _argv(tmp_path: Path, port: int, *more: str) -> list[str]:
    return [
        *("--port", str(port), "--work-dir", str(tmp_path / "work")),
        *("--prompts", "5", "--train-prompts", "10", *more),
    ]


def _assert_all_gone(children: list[Child]) -> None:
    assert children
    assert not [child.pid for child in children if psutil.pid_exists(child.pid)]


def test_the_whole_demonstration_ends_with_its_table_and_figures(
    children: list[Child], stub: ModuleType, tmp_path: Path, free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "figures.json"
    assert run.main(_argv(tmp_path, free_port, "--exit", "--json", str(figures))) == 0
    _assert_all_gone(children)
    assert [child.name for child in children] == ["trimtab serve", "trimtab trainer"]
    output = capsys.readouterr().out
    assert "30 rollouts of 10 training prompts are in the log" in output
    assert "3 streams were under way, 3 of them ended on the version they began with" in " ".join(output.split())
    assert "5 held-out prompts" in output
    result = json.loads(figures.read_text())
    assert [row["system"] for row in result["systems"]] == [
        *("base", "steered", "base, best of 8", "steered, best of 8")
    ]
    assert result["version"] == stub.NEW
    assert len(result["samples"]) == 3
    assert set(result["stages_s"]) == {"models", "engine", "rollouts", "training", "swap", "evaluation"}


def test_it_serves_on_with_a_command_to_try_until_a_signal(
    children: list[Child],
    tmp_path: Path,
    free_port: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(_child: Child, _timeout_s: float | None = None) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal did not arrive")

    monkeypatch.setattr(Child, "wait", interrupted)
    assert run.main(_argv(tmp_path, free_port)) == 0
    assert f"curl http://127.0.0.1:{free_port}/v1/completions" in capsys.readouterr().out
    _assert_all_gone(children)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("stage", ["_log_rollouts", "_swap", "_evaluate"])
def test_a_signal_before_the_table_ends_it_with_130_and_no_child_left(
    children: list[Child],
    tmp_path: Path,
    free_port: int,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    number: signal.Signals,
) -> None:
    monkeypatch.setattr(run.Demo, stage, _kill_self(number))
    assert run.main(_argv(tmp_path, free_port, "--exit")) == 130
    _assert_all_gone(children)


def _kill_self(number: signal.Signals) -> Callable[..., None]:
    def kill(*_: object) -> None:
        os.kill(os.getpid(), number)
        raise AssertionError("the signal did not arrive")

    return kill


@pytest.mark.parametrize(("outcome", "message"), [("failed", "out of luck"), ("silent", "ended with status 0")])
def test_a_job_that_fails_or_is_never_run_is_an_error_with_the_logs_kept(
    children: list[Child],
    tmp_path: Path,
    free_port: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    outcome: str,
    message: str,
) -> None:
    _set_trainer(monkeypatch, outcome)
    assert run.main(_argv(tmp_path, free_port, "--exit")) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert str(tmp_path / "work") in captured.out
    assert (tmp_path / "work" / "serve.log").exists()
    _assert_all_gone(children)


def test_a_server_that_dies_at_start_is_an_error_with_its_log(
    children: list[Child],
    tmp_path: Path,
    free_port: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(run, "serve_command", lambda **_: [sys.executable, "-c", "raise SystemExit('no memory')"])
    assert run.main(_argv(tmp_path, free_port, "--exit")) == 1
    assert "no memory" in capsys.readouterr().err
    _assert_all_gone(children)


def test_a_taken_port_is_refused_before_anything_is_built(
    children: list[Child], tmp_path: Path, free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", free_port))
        listener.listen()
        assert run.main(_argv(tmp_path, free_port, "--exit")) == 1
    assert "--port" in capsys.readouterr().err
    assert not children


@pytest.mark.parametrize(
    "argv",
    [["--prompts", "1"], ["--prompts", "x"], ["--steps", "0"], ["--unknown"], ["--port", "-1"], ["--port", "70000"]],
)
def test_bad_options_are_refused_with_status_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(argv) == 2
    assert argv[0] in capsys.readouterr().err


def test_help_is_shown_with_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--help"]) == 0
    assert "--exit" in capsys.readouterr().out


def test_the_training_job_is_one_that_the_trainer_accepts() -> None:
    config = run.job_config(MODELS, steps=240)
    parsed = parse_config({**config, "gateway": {"url": "http://x"}, "output_dir": "/o"})
    assert parsed.publish.route is None  # the demonstration switches the route itself
    assert parsed.sampling.max_tokens == 40


def test_prompt_and_streamed_tokens_fit_the_context_that_is_served() -> None:
    from trimtab_training.demo.tiny_lm import DemoSettings, train_tokenizer

    tokenizer = train_tokenizer(world.documents(0, 2000), DemoSettings().vocab_size)
    longest = max(len(tokenizer.encode(prompt).ids) for prompt in world.prompts(1, 2000))
    assert longest + run._STREAM_TOKENS <= DemoSettings().context - PREFIX_ROOM
