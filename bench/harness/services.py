"""A real engine and a real gateway in processes of their own, for benches that measure over HTTP."""

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

MODEL = "base"
"""Public name of the base model in engine and gateway."""
_READY_S = 300.0
_GRACE_S = 30.0


def stop_on_sigterm() -> None:
    """Make SIGTERM end this process as an exception does, so that its children are stopped."""
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))


@contextlib.contextmanager
def engine(base: Path, log: Path, *arguments: str, dtype: str = "float32", nice: int = 0) -> Iterator[str]:
    """A Trimtab engine on a base model; yields its address.

    Args:
        base: Directory of the model.
        log: Where its output goes.
        arguments: Further flags of vLLM.
        dtype: Of the base's weights.
        nice: How much lower its priority shall be: vLLM busy-waits.
    """
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        *(sys.executable, "-m", "trimtab_adapters.vllm.launch", f"--model={base}", f"--served-model-name={MODEL}"),
        *(f"--port={port}", f"--dtype={dtype}", "--enforce-eager", "--max-model-len=512", "--max-num-seqs=256"),
        *(f"--nice={nice}", "--die-with-parent", *arguments),
    ]
    with _running(command, f"{url}/trimtab/status", log):
        yield url


@contextlib.contextmanager
def gateway(engine_url: str, data_dir: Path, *arguments: str) -> Iterator[str]:
    """A gateway before an engine, with its database in `data_dir`; yields its address."""
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    data_dir.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, "-m", "trimtab_server.cli", "serve", "--engine-url", engine_url, "--port", str(port)),
        *("--served-model-name", MODEL, "--data-dir", str(data_dir), *arguments),
    ]
    with _running(command, f"{url}/ready", data_dir / "gateway.log"):
        yield url


@contextlib.contextmanager
def _running(command: Sequence[str], ready_url: str, log: Path) -> Iterator[None]:
    """A child in a process group of its own, from its first 200 to its end."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRIMTAB_")}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "OMP_WAIT_POLICY": "PASSIVE"}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(command), stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        _wait_ready(ready_url, process, log)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=5.0, trust_env=False).status_code == 200:
                return
        time.sleep(0.2)
    raise RuntimeError(f"{url} did not come up (exit {process.poll()}):\n{log.read_text(errors='replace')[-3000:]}")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
