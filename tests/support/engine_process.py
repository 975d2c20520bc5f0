"""A real engine in a child process, for tests and benches."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

ENGINE = (sys.executable, "-m", "trimtab_adapters.vllm.launch")

TINY_ENGINE_ARGS = (
    "--served-model-name=base",
    "--dtype=float32",
    "--enforce-eager",
    "--max-model-len=256",
    "--block-size=32",
    "--max-num-seqs=32",
    "--max-num-batched-tokens=64",
)
"""Small enough to start in half a minute, with chunked prefill forced by the token budget."""


def engine_environment() -> dict[str, str]:
    return dict(os.environ) | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "PYTHONUNBUFFERED": "1"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_for(url: str, process: "subprocess.Popen[bytes]", log: Path, *, timeout_s: float = 240.0) -> None:
    """Until the address answers 200. Fails with the end of the log when the process ends or the time is over."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=5.0, trust_env=False).status_code == 200:
                return
        time.sleep(0.2)
    raise AssertionError(f"{url} did not come up (exit {process.poll()}):\n{log.read_text(errors='replace')[-4000:]}")


def stop(process: "subprocess.Popen[bytes]", *, grace_s: float = 30.0) -> int:
    """SIGTERM by its own process id, then SIGKILL to its group."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


@contextlib.contextmanager
def running(command: Sequence[str], ready_url: str, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A child in a process group of its own, from ready to stopped."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=engine_environment(), start_new_session=True
        )
    try:
        wait_for(ready_url, process, log)
        yield process
    finally:
        stop(process)


@contextlib.contextmanager
def engine(model: Path, log: Path, *arguments: str) -> Iterator[str]:
    """A tiny engine; yields its address."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [*ENGINE, f"--model={model}", f"--port={port}", *TINY_ENGINE_ARGS, *arguments]
    with running(command, f"{url}/trimtab/status", log):
        yield url
