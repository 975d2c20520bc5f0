"""Servers and libraries that answer a chat with the best of several candidates, behind one seam."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx

from harness.best_of_n_world import REWARD
from harness.peer_venvs import PeerMissingError
from harness.services import MODEL

Messages = Sequence[Mapping[str, str]]
_READY_S = 120.0


@dataclass(frozen=True, slots=True)
class PeerAnswer:
    """What a peer gave.

    Attributes:
        text: Of its choice.
        prompt_tokens: As it reports them; None when it reports none.
        completion_tokens: As it reports them.
        has_logprobs: Whether the answer shows log-probabilities.
        wall_s: From the call to the whole answer, seen from where a user calls.
    """

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None
    has_logprobs: bool
    wall_s: float


class Peer(Protocol):
    """Answers chats."""

    def ask(self, messages: Messages, params: Mapping[str, Any]) -> PeerAnswer:
        """One chat, with OpenAI's sampling parameters. Raises `RuntimeError` when the peer gives an error."""
        ...


class HttpPeer:
    """A server with OpenAI's chat route.

    Args:
        url: Of the server.
        fields: Put into every request.
    """

    def __init__(self, url: str, fields: Mapping[str, Any]) -> None:
        self._fields = fields
        self._http = httpx.Client(base_url=url, timeout=600.0, trust_env=False)

    def ask(self, messages: Messages, params: Mapping[str, Any]) -> PeerAnswer:
        """See `Peer`."""
        started = time.perf_counter()
        body = {"model": MODEL, "messages": list(messages), **params, **self._fields}
        response = self._http.post("/v1/chat/completions", json=body)
        wall_s = time.perf_counter() - started
        if not response.is_success:
            raise RuntimeError(f"status {response.status_code}: {response.text[:200]}")
        answer = response.json()
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        return PeerAnswer(
            text=choice["message"]["content"] or "",
            prompt_tokens=usage.get("prompt_tokens"),
            completion_tokens=usage.get("completion_tokens"),
            has_logprobs=bool(choice.get("logprobs")),
            wall_s=wall_s,
        )


class ScriptPeer:
    """A library in a process of its own that reads and writes JSON lines; the time is taken inside it."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path) -> None:
        self._process = process
        self._log = log

    def ask(self, messages: Messages, params: Mapping[str, Any]) -> PeerAnswer:
        """See `Peer`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"messages": list(messages), "params": dict(params)}) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"it ended: {_last_line(self._log)}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        usage = answer["usage"]
        return PeerAnswer(answer["text"], usage["prompt_tokens"], usage["completion_tokens"], False, answer["wall_s"])


@contextlib.contextmanager
def trimtab(gateway_url: str, num: int) -> Iterator[Peer]:
    """The gateway itself; its reward is not calibrated, since nobody else's is."""
    yield HttpPeer(gateway_url, {"best_of": num, "reward": REWARD, "calibration": {"size": 0}})


@contextlib.contextmanager
def one_sample(gateway_url: str) -> Iterator[Peer]:
    """A single candidate through the gateway: what a choice by chance would give."""
    yield HttpPeer(gateway_url, {})


@contextlib.contextmanager
def optillm(python: Path, engine_url: str, num: int, folder: Path) -> Iterator[Peer]:
    """Its server with the approach `bon`; the model judges itself."""
    port = _free_port()
    command = [
        *(str(python.parent / "optillm"), "--approach", "bon", "--best-of-n", str(num), "--model", MODEL),
        *("--base-url", f"{engine_url}/v1", "--host", "127.0.0.1", "--port", str(port), "--log", "warning"),
    ]
    log = folder / "optillm.log"
    with _process(command, log, folder, {"OPENAI_API_KEY": "none"}, stdin=subprocess.DEVNULL) as process:
        url = f"http://127.0.0.1:{port}"
        _wait(f"{url}/v1/models", process, log)
        yield HttpPeer(url, {})


@contextlib.contextmanager
def script(python: Path, path: Path, arguments: Sequence[str], folder: Path) -> Iterator[Peer]:
    """A library behind a script of ours."""
    log = folder / f"{path.stem}.log"
    with _process([str(python), "-P", str(path), *arguments], log, folder, {}, stdin=subprocess.PIPE) as process:
        yield ScriptPeer(process, log)


@contextlib.contextmanager
def _process(
    command: Sequence[str], log: Path, folder: Path, environment: Mapping[str, str], *, stdin: int
) -> Iterator["subprocess.Popen[str]"]:
    """A child with a clean import path, in a process group of its own."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    with log.open("wb") as errors:
        process = subprocess.Popen(
            list(command),
            stdin=stdin,
            stdout=subprocess.PIPE if stdin == subprocess.PIPE else errors,
            stderr=errors,
            text=True,
            cwd=folder,
            env={**inherited, "NO_PROXY": "127.0.0.1", **environment},
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(url: str, process: "subprocess.Popen[str]", log: Path) -> None:
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            httpx.get(url, timeout=5.0, trust_env=False)
            return
        time.sleep(0.2)
    raise PeerMissingError(f"it did not come up (exit {process.poll()}): {_last_line(log)}")


def _last_line(log: Path) -> str:
    return (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1][:200]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
