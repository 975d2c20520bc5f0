"""The demonstration's child processes: the gateway with its engine, and the trainer."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from trimtab_adapters.contract.errors import TrimtabError

ROUTE: Final = "kind"
BASE_MODEL: Final = "base"
_ADAPTER_KV_BYTES: Final = 256 << 20
PREFIX_ROOM: Final = 8
"""Positions that an adapter LM keeps for its control tokens, which the base model does not see."""


class ChildDiedError(TrimtabError):
    """A child process ended when it should have gone on; the message shows the end of its log."""


class Child:
    """One child process in a session of its own, with its output in a file.

    A Ctrl-C on the terminal therefore does not reach it; `stop` ends it, by its own process id only. See `running`.

    Args:
        name: For messages.
        command: Program and arguments.
        log_path: Where its output goes.
        environment: Its whole environment.
        nice: How much to lower its priority.
        stop_grace_s: How long it may take to stop after SIGTERM before it is killed.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log_path: Path,
        *,
        environment: Mapping[str, str],
        nice: int = 0,
        stop_grace_s: float = 30.0,
    ) -> None:
        self.name = name
        self.log_path = log_path
        self._stop_grace_s = stop_grace_s
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,
            )
        if nice:
            os.setpriority(os.PRIO_PROCESS, self._process.pid, os.getpriority(os.PRIO_PROCESS, 0) + nice)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit status; None while it runs."""
        return self._process.poll()

    def check_alive(self) -> None:
        """Raise `ChildDiedError` if it has ended."""
        if (status := self.returncode) is not None:
            raise ChildDiedError(f"{self.name} ended with status {status}; its log ends with:\n{self.log_tail()}")

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait for its end; returns the exit status. Raises `subprocess.TimeoutExpired`."""
        return self._process.wait(timeout_s)

    def log_tail(self, num_lines: int = 25) -> str:
        """The last lines of its output."""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-num_lines:])

    def stop(self) -> None:
        """End it and wait until it is gone: SIGTERM first, SIGKILL after the grace. Harmless when it has ended."""
        if self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(self._stop_grace_s)
        except subprocess.TimeoutExpired:
            self._process.kill()  # the engine follows by itself: it runs with --die-with-parent
            self._process.wait()


@contextmanager
def running(start: Callable[[], Child]) -> Iterator[Child]:
    """A child for as long as the block lasts: whatever ends it, signals included, the child is stopped.

    Args:
        start: Makes the child. A signal meanwhile acts when the child is known, so that none is lost.
    """
    child, early = None, list[int]()
    try:
        with _handlers(lambda number, _frame: early.append(number)):
            child = start()
        if early:
            raise KeyboardInterrupt
        yield child
    finally:
        if child is not None:
            with _handlers(signal.SIG_IGN):  # a second Ctrl-C must not leave it behind
                child.stop()


@contextmanager
def signals_as_interrupts() -> Iterator[None]:
    """SIGTERM and SIGINT raise KeyboardInterrupt in the main thread."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    with _handlers(interrupt):
        yield


@contextmanager
def _handlers(handler: Any) -> Iterator[None]:
    saved = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, before in saved.items():
            signal.signal(number, before)


def serve_command(*, base: Path, adapter: Path, host: str, port: int, data_dir: Path, context: int) -> list[str]:
    """`trimtab serve` for the demonstration: the base LM, and the untrained adapter LM on the route `kind`."""
    gateway = [
        *(sys.executable, "-m", "trimtab_server.cli", "serve"),
        *("--model", str(base), "--served-model-name", BASE_MODEL, "--adapter", f"{ROUTE}={adapter}"),
        *("--host", host, "--port", str(port), "--data-dir", str(data_dir)),
    ]
    engine = [
        *(
            "--dtype",
            "float32",
            "--max-model-len",
            str(context - PREFIX_ROOM),
            "--max-num-seqs",
            "256",
            "--enforce-eager",
        ),
        *("--adapter-kv-bytes", str(_ADAPTER_KV_BYTES)),
    ]
    return [*gateway, "--", *engine]


def trainer_command(*, url: str, output_dir: Path) -> list[str]:
    """`trimtab trainer` for one job."""
    return [
        *(sys.executable, "-m", "trimtab_server.cli", "trainer"),
        *("--url", url, "--output-dir", str(output_dir), "--once"),
    ]


def child_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of the children: ours without the settings of another Trimtab, and what a small machine needs."""
    kept = {name: value for name, value in environ.items() if not name.startswith("TRIMTAB_")}
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "OMP_WAIT_POLICY": "PASSIVE",  # engine and trainer share the cores
        "HF_HUB_OFFLINE": "1",
        **kept,
    }


def is_port_free(host: str, port: int) -> bool:
    """Whether nothing listens on an address."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
