"""An HTTP proxy before an engine that keeps what was asked and answered. For JSON calls only, not for streams."""

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
from typing_extensions import override


@dataclass(frozen=True, slots=True)
class Call:
    """One call that went through.

    Attributes:
        path: Of the route.
        body: What was asked, an empty object when there was nothing.
        answer: What came back, an empty object when it was no JSON object.
        status: HTTP status.
    """

    path: str
    body: dict[str, Any]
    answer: dict[str, Any]
    status: int

    @property
    def is_generation(self) -> bool:
        """Whether tokens were generated for it."""
        return self.path.endswith("/completions") and self.status == 200

    def tokens(self, kind: str) -> int:
        """`prompt_tokens` or `completion_tokens` by the engine's own count."""
        return int((self.answer.get("usage") or {}).get(kind) or 0)


class CountingProxy:
    """See the module. Use `counting_proxy` to run one.

    Args:
        target: Address of the engine.
    """

    def __init__(self, target: str) -> None:
        self._calls: list[Call] = []
        self._lock = threading.Lock()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=32, keepalive_expiry=2.0)
        self._http = httpx.Client(base_url=target, timeout=600.0, trust_env=False, limits=limits)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server.server_port}"

    def take(self) -> list[Call]:
        """What went through since the last time this was asked."""
        with self._lock:
            calls, self._calls = self._calls, []
        return calls

    def close(self) -> None:
        """End it."""
        self.server.shutdown()
        self.server.server_close()
        self._http.close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Without it the answer's head waits for the delayed acknowledgement of the one before: 40 ms a call.
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                self._pass_on()

            def do_POST(self) -> None:
                self._pass_on()

            def _pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                response = proxy.forward(self.command, self.path, body)
                with contextlib.suppress(ConnectionError):  # the caller may have gone
                    self.send_response(response.status_code)
                    self.send_header("Content-Type", response.headers.get("Content-Type", "application/json"))
                    self.send_header("Content-Length", str(len(response.content)))
                    self.end_headers()
                    self.wfile.write(response.content)

            @override
            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler

    def forward(self, method: str, path: str, body: bytes) -> httpx.Response:
        """Ask the engine and keep the call."""
        response = self._http.request(method, path, content=body, headers={"Content-Type": "application/json"})
        call = Call(path, _object(body), _object(response.content), response.status_code)
        with self._lock:
            self._calls.append(call)
        return response


def _object(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content) if content else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


@contextlib.contextmanager
def counting_proxy(target: str) -> Iterator[CountingProxy]:
    """A proxy for as long as the block lasts."""
    proxy = CountingProxy(target)
    thread = threading.Thread(target=proxy.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.close()
        thread.join()
