"""A stand-in for `trimtab serve` in the demonstration's tests: the same calls, canned answers, standard library only.

Run as a program: `stub_gateway.py serve PORT` or `stub_gateway.py trainer URL succeeded|failed|silent`.
"""

import json
import signal
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from typing_extensions import override

OLD, NEW = "0" * 16, "1" * 16
KIND = " Of course, my dear friend. Please come back soon."
RUDE = " Go away."


class State:
    """What the stub remembers."""

    def __init__(self) -> None:
        self.version = OLD
        self.shown = threading.Event()  # the new version was seen on the route
        self.job: dict[str, Any] = {}
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"
    state: State

    def do_GET(self) -> None:
        """Readiness, routes and jobs."""
        if self.path == "/ready":
            self._json({"status": "ready"})
        elif self.path == "/admin/routes/kind":
            if self.state.version != OLD:
                self.state.shown.set()
            self._json({"route": "kind", "steering": [{"name": "kind", "version": self.state.version, "alpha": 1.0}]})
        elif self.path == "/admin/training-jobs/job-1":
            self._json(self.state.job)
        else:
            self._error(404, f"no {self.path}")

    def do_POST(self) -> None:
        """Completions, jobs and the switch."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/v1/completions":
            self._stream() if body.get("stream") else self._complete(body)
        elif self.path == "/admin/training-jobs":
            self.state.job = {"id": "job-1", "state": "queued", "progress": {}, "version": None, "error": None}
            self._json(self.state.job)
        elif self.path == "/admin/routes/kind/activate":
            self.state.version = body["version"]
            self._json({"route": "kind"})
        elif self.path == "/stub/finish":
            self.state.job |= {"state": body["state"], "version": NEW, "error": "out of luck"}
            self._json({})
        else:
            self._error(404, f"no {self.path}")

    def _complete(self, body: dict[str, Any]) -> None:
        is_kind = body["model"] == "kind" or body.get("best_of", 1) > 1
        logprobs = {"base": [-1.0, -1.0], "adapter": [], "kl": [0.5, 0.0] if body["model"] == "kind" else [0.0, 0.0]}
        choice = {"text": KIND if is_kind else RUDE, "steering_logprobs": logprobs}
        num = body.get("n", 1)
        self._json(
            {
                "choices": [{"index": i, **choice} for i in reversed(range(num))],
                "usage": {"completion_tokens": 2 * body.get("best_of", num)},
            }
        )

    def _stream(self) -> None:
        """The first chunk at once, the last when the switch is over."""
        version = self.state.version
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        steering = {"adapters": [{"name": "kind", "version": version, "alpha": 1.0}]}
        self._event({"choices": [{"text": " Of"}], "steering": steering})
        self.state.shown.wait(30)
        self._event({"choices": [{"text": " course"}]})
        self._event({"choices": [{"text": ".", "finish_reason": "length"}], "steering": steering})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, chunk: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())

    def _json(self, value: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _error(self, status: int, message: str) -> None:
        self._json({"error": {"message": message, "type": "x", "param": None, "code": None}}, status)

    @override
    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


def build_server(port: int = 0) -> ThreadingHTTPServer:
    """A server on loopback, not yet serving."""
    handler = type("BoundHandler", (Handler,), {"state": State()})
    return ThreadingHTTPServer(("127.0.0.1", port), handler)


def main() -> None:
    """See the module's docstring."""
    if sys.argv[1] == "serve":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        build_server(int(sys.argv[2])).serve_forever()
    elif sys.argv[3] != "silent":
        body = json.dumps({"state": sys.argv[3]}).encode()
        urllib.request.urlopen(urllib.request.Request(f"{sys.argv[2]}/stub/finish", data=body), timeout=10).close()


if __name__ == "__main__":
    main()
