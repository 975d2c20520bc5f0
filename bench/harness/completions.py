"""Completions over HTTP, from a gateway or straight from an engine, and what each of them cost."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import httpx

MAX_N = 128
"""Most choices that a gateway gives for one request."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer.

    Attributes:
        texts: Of the choices.
        token_ids: Of the choices, where they were asked for.
        calibrated: Calibrated reward of the first choice; None without calibration.
        num_tokens: Generated for the answer, all candidates counted.
        num_reference_tokens: Generated to calibrate the reward.
        wall_s: From sending the request to its whole answer.
    """

    texts: list[str]
    token_ids: list[list[int]]
    calibrated: float | None
    num_tokens: int
    num_reference_tokens: int
    wall_s: float


class Completions:
    """`POST /v1/completions` of one server. An answer that is not a success raises `RuntimeError` with its body.

    Args:
        url: Of the server.
        concurrency: Most requests at a time in `all`.
    """

    def __init__(self, url: str, *, concurrency: int = 16) -> None:
        self._concurrency = concurrency
        self._http = httpx.Client(base_url=url, timeout=600.0, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to any request with a JSON object as body."""
        response = self._http.post(path, json=dict(body))
        if not response.is_success:
            raise RuntimeError(f"POST {path} answered {response.status_code}: {response.text[:500]}")
        answer: dict[str, Any] = response.json()
        return answer

    def one(self, body: Mapping[str, Any]) -> Completion:
        """One request."""
        started = time.perf_counter()
        answer = self.post("/v1/completions", body)
        wall_s = time.perf_counter() - started
        choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
        reward = (choices[0].get("selection") or {}).get("reward") or {}
        return Completion(
            texts=[choice["text"] for choice in choices],
            token_ids=[choice.get("token_ids") or [] for choice in choices],
            calibrated=reward.get("calibrated"),
            num_tokens=int(answer["usage"]["completion_tokens"]),
            num_reference_tokens=int(answer["usage"].get("reference_tokens", 0)),
            wall_s=wall_s,
        )

    def all(self, bodies: Sequence[Mapping[str, Any]]) -> list[Completion]:
        """Several requests, some of them at a time; answers in order."""
        with ThreadPoolExecutor(self._concurrency) as pool:
            return list(pool.map(self.one, bodies))
