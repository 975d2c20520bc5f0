"""A real gateway with its supervised engine in child processes."""

import contextlib
import shutil
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


@contextlib.contextmanager
def black_box_gateway(
    data_dir: Path, provider_url: str, tokenizer: Path, *arguments: str, api: str = "vllm"
) -> Iterator[RunningGateway]:
    """A gateway before a vLLM server of which it knows nothing but the completions API.

    Args:
        data_dir: Its data.
        provider_url: The server, without `/v1`.
        tokenizer: Directory with the base's tokenizer; the gateway gets a copy with a chat template.
        arguments: More of `trimtab serve`.
        api: How the server is spoken to.
    """
    own = data_dir / "tokenizer"
    own.mkdir(parents=True)
    for path in tokenizer.glob("tokenizer*.json"):
        shutil.copy(path, own)
    (own / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    black_box = ("--black-box-url", f"{provider_url}/v1", "--black-box-model", "base", "--black-box-api", api)
    with running_gateway(
        data_dir, *black_box, "--black-box-tokenizer", str(own), "--black-box-context", "256", *arguments
    ) as started:
        yield started
