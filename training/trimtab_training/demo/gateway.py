"""What the demonstration asks of the gateway, over HTTP only."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Self

import httpx

from trimtab_adapters.contract.errors import EngineError, EngineUnavailableError
from trimtab_training.http_retry import error_of


@dataclass(frozen=True, slots=True)
class Answer:
    """One choice of a completion, with what the whole request cost.

    Attributes:
        text: The reply.
        base_logprobs: One per generated token: log-probability under the base.
        kl: One per generated token: KL(steered || base) in nats, of the next-token distribution.
        num_tokens: Generated tokens of all candidates of the request.
        num_reference_tokens: Generated tokens of the reference rollouts drawn to calibrate the reward.
    """

    text: str
    base_logprobs: list[float]
    kl: list[float]
    num_tokens: int
    num_reference_tokens: int = 0


class Gateway:
    """A connection to the gateway; safe for use from several threads.

    All methods raise a `TrimtabError` when the gateway refuses or cannot be reached.

    Args:
        url: Where it listens.
        concurrency: Most requests in flight in `complete`.
        transport: Replaces the network, for tests.
    """

    def __init__(self, url: str, *, concurrency: int = 64, transport: httpx.BaseTransport | None = None) -> None:
        self.url = url
        self._concurrency = concurrency
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=concurrency)
        self._http = httpx.Client(base_url=url, timeout=300.0, limits=limits, transport=transport, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def is_ready(self) -> bool:
        """Whether the gateway answers and its engine holds all active versions."""
        try:
            return self._http.get("/ready", timeout=5.0).status_code == 200
        except httpx.TransportError:
            return False

    def complete(
        self, bodies: Sequence[Mapping[str, Any]], *, on_done: Callable[[], None] = lambda: None
    ) -> list[list[Answer]]:
        """`POST /v1/completions` for each body, several at a time; the choices of each, in order.

        Args:
            bodies: For one prompt each.
            on_done: Called after each request.
        """

        def one(body: Mapping[str, Any]) -> list[Answer]:
            answers = _answers(self._call("POST", "/v1/completions", body))
            on_done()
            return answers

        with ThreadPoolExecutor(self._concurrency, thread_name_prefix="demo") as pool:
            futures = [pool.submit(one, body) for body in bodies]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()  # raises the first error at once, while others still run
                return [future.result() for future in futures]
            finally:  # after an error or Ctrl-C the rest must not be sent
                pool.shutdown(wait=False, cancel_futures=True)

    def stream(self, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks of a streamed completion.

        Raises:
            EngineError: It broke off: an error event, or no `[DONE]` at the end.
        """
        try:
            with self._http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
                if not response.is_success:
                    response.read()
                    raise error_of(response)
                for line in response.iter_lines():
                    if line == "data: [DONE]":
                        return
                    if line.startswith("data: "):
                        chunk = json.loads(line.removeprefix("data: "))
                        if "error" in chunk:
                            raise EngineError(f"the stream broke off: {chunk['error'].get('message')}")
                        yield chunk
        except httpx.TransportError as exc:
            raise EngineUnavailableError(f"the stream from {self.url} broke off: {exc}") from exc
        raise EngineError("the stream ended without [DONE]")

    def post_job(self, config: Mapping[str, Any], *, name: str) -> str:
        """Queue a training job; returns its id."""
        return str(self._call("POST", "/admin/training-jobs", {"config": dict(config), "name": name})["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        """A training job as it is now."""
        return self._call("GET", f"/admin/training-jobs/{job_id}")

    def route_version(self, route: str) -> str:
        """The adapter version that a route uses now."""
        return str(self._call("GET", f"/admin/routes/{route}")["steering"][0]["version"])

    def activate(self, route: str, adapter: str, version: str) -> None:
        """Put an adapter version on a route."""
        self._call("POST", f"/admin/routes/{route}/activate", {"adapter": adapter, "version": version})

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        try:
            response = self._http.request(method, path, json=dict(body) if body is not None else None)
        except httpx.TransportError as exc:
            raise EngineUnavailableError(f"{method} {self.url}{path}: {exc}") from exc
        if not response.is_success:
            raise error_of(response)
        answer = response.json()
        if not isinstance(answer, dict):
            raise EngineError(f"{method} {path}: the answer is not an object")
        return answer


def _answers(completion: Mapping[str, Any]) -> list[Answer]:
    usage = completion["usage"]
    answers = []
    for choice in sorted(completion["choices"], key=lambda choice: int(choice["index"])):
        logprobs = choice.get("steering_logprobs") or {}
        answers.append(
            Answer(
                text=choice["text"],
                base_logprobs=logprobs.get("base", []),
                kl=logprobs.get("kl", []),
                num_tokens=int(usage["completion_tokens"]),
                num_reference_tokens=int(usage.get("reference_tokens", 0)),
            )
        )
    return answers
