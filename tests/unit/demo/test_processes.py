import os
import signal
import sys
from pathlib import Path

import psutil
import pytest
from typing_extensions import override

from trimtab_training.demo.processes import (
    Child,
    ChildDiedError,
    child_environment,
    is_port_free,
    running,
    serve_command,
    signals_as_interrupts,
    trainer_command,
)

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)",
]


def _child(command: list[str], tmp_path: Path, **options: float) -> Child:
    return Child("the child", command, tmp_path / "log", environment=os.environ, **options)  # type: ignore[arg-type]


def _wait_up(child: Child) -> None:
    while "up" not in child.log_tail():
        child.check_alive()


def test_the_child_is_gone_after_the_block_and_after_an_error_in_it(tmp_path: Path) -> None:
    with running(lambda: _child(SLEEP, tmp_path)) as child:
        assert child.returncode is None
    assert child.wait() == -signal.SIGTERM
    with pytest.raises(ZeroDivisionError), running(lambda: _child(SLEEP, tmp_path)) as child:
        child.pid // 0
    assert not psutil.pid_exists(child.pid)


def test_a_child_that_does_not_obey_is_killed(tmp_path: Path) -> None:
    with running(lambda: _child(STUBBORN, tmp_path, stop_grace_s=0.2)) as child:
        _wait_up(child)
    assert child.returncode == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_block_and_the_child(number: signal.Signals, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), signals_as_interrupts(), running(lambda: _child(SLEEP, tmp_path)) as child:
        os.kill(os.getpid(), number)
    assert not psutil.pid_exists(child.pid)


def test_a_signal_while_the_child_starts_is_not_lost_and_the_child_is_stopped(tmp_path: Path) -> None:
    started: list[Child] = []

    def start() -> Child:
        os.kill(os.getpid(), signal.SIGTERM)
        started.append(_child(SLEEP, tmp_path))
        return started[0]

    with pytest.raises(KeyboardInterrupt), signals_as_interrupts(), running(start):
        raise AssertionError("the block must not begin")
    assert not psutil.pid_exists(started[0].pid)


def test_a_signal_while_the_child_stops_does_not_leave_it_behind(tmp_path: Path) -> None:
    class Interrupted(Child):
        @override
        def stop(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            super().stop()

    before = signal.getsignal(signal.SIGINT)  # ignored in a process that a shell started in the background
    with signals_as_interrupts():
        with running(lambda: Interrupted("c", SLEEP, tmp_path / "log", environment=os.environ)) as child:
            pass
        assert child.returncode is not None
    assert signal.getsignal(signal.SIGINT) is before


def test_a_dead_child_is_reported_with_its_status_and_the_end_of_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no such model'); raise SystemExit(3)"]
    with running(lambda: _child(command, tmp_path)) as child:
        assert child.wait(60) == 3
        with pytest.raises(ChildDiedError, match=r"the child ended with status 3(.|\n)*no such model"):
            child.check_alive()


def test_the_child_runs_in_its_own_session_at_the_given_priority(tmp_path: Path) -> None:
    with running(lambda: _child(SLEEP, tmp_path, nice=3)) as child:
        assert os.getsid(child.pid) == child.pid != os.getsid(0)
        assert os.getpriority(os.PRIO_PROCESS, child.pid) == os.getpriority(os.PRIO_PROCESS, 0) + 3


def test_settings_of_another_trimtab_do_not_reach_the_children() -> None:
    environment = child_environment({"TRIMTAB_API_KEYS": "secret", "PATH": "/bin", "VLLM_CPU_KVCACHE_SPACE": "4"})
    assert environment["PATH"] == "/bin"
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "4"
    assert not any(name.startswith("TRIMTAB_") for name in environment)


def test_the_commands_name_models_address_and_directories() -> None:
    command = serve_command(
        base=Path("/b"), adapter=Path("/a"), host="127.0.0.1", port=8001, data_dir=Path("/d"), context=256
    )
    own, engine = command[: command.index("--")], command[command.index("--") :]
    assert own[1:4] == ["-m", "trimtab_server.cli", "serve"]
    assert {"/b", "kind=/a", "8001", "/d"} <= set(own)
    assert engine[engine.index("--max-model-len") + 1] == "248"  # the prefix needs room
    assert trainer_command(url="http://x", output_dir=Path("/o"))[3:] == [
        *("trainer", "--url", "http://x", "--output-dir", "/o", "--once")
    ]


def test_a_port_with_a_listener_is_not_free(free_port: int) -> None:
    import socket

    assert is_port_free("127.0.0.1", free_port)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", free_port))
        listener.listen()
        assert not is_port_free("127.0.0.1", free_port)
