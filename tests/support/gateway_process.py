"""A real gateway with its supervised engine in child processes."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from engine_process import free_port, running


@dataclass(frozen=True)
class RunningGateway:
    """Where it listens, its process id, and where its data lies."""

    url: str
    pid: int
    data_dir: Path
    log: Path

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, trust_env=False)


def serve_command(port: int, data_dir: Path, *arguments: str, engine_args: tuple[str, ...] = ()) -> list[str]:
    command = [sys.executable, "-m", "trimtab_server.cli", "serve", "--port", str(port), "--data-dir", str(data_dir)]
    command += ["--served-model-name", "base", *arguments]
    return [*command, "--", *engine_args] if engine_args else command


@contextlib.contextmanager
def running_gateway(
    data_dir: Path, *arguments: str, engine_args: tuple[str, ...] = (), port: int | None = None
) -> Iterator[RunningGateway]:
    """From ready to stopped. The base model's public name is `base`."""
    port = port or free_port()
    data_dir.mkdir(parents=True, exist_ok=True)
    log = data_dir / "gateway.log"
    url = f"http://127.0.0.1:{port}"
    with running(serve_command(port, data_dir, *arguments, engine_args=engine_args), f"{url}/ready", log) as process:
        yield RunningGateway(url, process.pid, data_dir, log)
