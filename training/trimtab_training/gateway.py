"""What the trainer asks of the gateway over HTTP: rollouts, scores, versions, routes and jobs."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ConfigDict, ValidationError

from trimtab_adapters.contract.engine_api import EngineStatus
from trimtab_adapters.contract.errors import EngineError, RewardError, StorageError
from trimtab_adapters.contract.params import VersionId
from trimtab_adapters.contract.records import Rollout
from trimtab_adapters.contract.rewards import RewardInput, check_scores
from trimtab_training.http_retry import RetryingClient
from trimtab_training.interruption import Interruption

_Model = TypeVar("_Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Completion:
    """One choice of an answer, as token ids.

    Attributes:
        steered_logprobs: Of each token, before temperature; None unless `steering_logprobs` was asked for.
        base_logprobs: Likewise.
    """

    text: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    finish_reason: str | None
    steered_logprobs: tuple[float, ...] | None = None
    base_logprobs: tuple[float, ...] | None = None


class ScoreReply(BaseModel):
    """Rewards in the order of the inputs, and the version of the reward that gave them."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    rewards: list[float]
    version: str


class TrainingJob(BaseModel):
    """A training job as the gateway tells it to a worker; what else it says is not needed here."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str
    state: str
    config: dict[str, Any] = {}
    attempt: int | None = None
    """Which claim of the job this is; older ones are over."""
    lease_s: float = 120.0
    """How long after a heartbeat another worker may claim the job."""


class _Registered(BaseModel):
    model_config = ConfigDict(extra="ignore")

    version: VersionId


class _Engine(BaseModel):
    model_config = ConfigDict(extra="ignore")

    status: EngineStatus | None = None


class _Engines(BaseModel):
    model_config = ConfigDict(extra="ignore")

    data: list[_Engine]


class GatewayClient:
    """A connection to one gateway. Safe for use from several threads. Close it, or use it as a context manager.

    All methods raise a `TrimtabError` of the class that the gateway's status stands for, and `TrainingInterrupted`
    when `interruption` is requested while they wait.

    Args:
        url: Base URL of the gateway.
        admin_key: For `/admin`; None where the gateway asks for none.
        api_key: For `/v1`; `admin_key` when None.
        concurrency: Most completion requests in flight.
        timeout_s: Limit for one request.
        retry_for_s: How long a busy, restarting or unreachable gateway is asked again.
        interruption: Ends waiting early.
        transport: Replaces the network, for tests.
    """

    def __init__(
        self,
        url: str,
        *,
        admin_key: str | None = None,
        api_key: str | None = None,
        concurrency: int = 16,
        timeout_s: float = 300.0,
        retry_for_s: float = 300.0,
        interruption: Interruption | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.concurrency = concurrency
        self._admin_headers = _bearer(admin_key)
        self._api_headers = _bearer(api_key or admin_key)
        self._interruption = interruption or Interruption()
        self._http = RetryingClient(
            httpx.Client(
                base_url=url,
                timeout=timeout_s,
                transport=transport,
                limits=httpx.Limits(max_connections=concurrency + 4, max_keepalive_connections=concurrency + 4),
            ),
            retry_for_s=retry_for_s,
            interruption=self._interruption,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def complete(
        self, bodies: Sequence[Mapping[str, Any]], *, on_done: Callable[[], None] | None = None
    ) -> list[list[Completion]]:
        """Send completion requests, at most `concurrency` at a time.

        Args:
            bodies: Bodies of `POST /v1/completions` for one prompt each; `return_token_ids` is added.
            on_done: Called after each request, from any thread.

        Returns:
            The choices of each request, in the order of the bodies.
        """

        def one(body: Mapping[str, Any]) -> list[Completion]:
            self._interruption.check()
            payload = {**body, "return_token_ids": True, "stream": False}
            answer = self._http.call("POST", "/v1/completions", headers=self._api_headers, json=payload).json()
            if on_done is not None:
                on_done()
            return _completions(answer)

        with ThreadPoolExecutor(max_workers=self.concurrency, thread_name_prefix="complete") as pool:
            futures = [pool.submit(one, body) for body in bodies]
            try:
                return [future.result() for future in futures]
            finally:  # on an error the rest must not be sent
                for future in futures:
                    future.cancel()

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Any call that an API key opens and that answers with a JSON object, such as one completion."""
        response = self._http.call(method, path, headers=self._api_headers, json=body)
        try:
            answer = response.json()
        except ValueError as exc:
            raise EngineError(f"the gateway's answer to {path} is not readable: {exc}") from exc
        if not isinstance(answer, dict):
            raise EngineError(f"the gateway's answer to {path} is not an object")
        return answer

    def read_rollouts(self, where: Mapping[str, str | int | float | bool]) -> Iterator[Rollout]:
        """Logged rollouts, oldest first; `where` holds the filters of `GET /admin/rollouts/export`."""
        query = {"format": "jsonl", **where}
        for line in self._http.lines("/admin/rollouts/export", params=query, headers=self._admin_headers):
            try:
                rollout = Rollout.model_validate(json.loads(line))  # pydantic's own JSON refuses lone surrogates
            except ValidationError as exc:  # without what was said there: a log holds everything
                field = ".".join(str(part) for part in exc.errors()[0]["loc"])
                why = f"{field}: {exc.errors()[0]['msg']}"
                raise StorageError(f"the gateway exported a rollout that this version cannot read: {why}") from exc
            except ValueError as exc:
                raise StorageError(f"the gateway exported something else than rollouts: {exc}") from exc
            yield rollout

    def score(self, reward: str, inputs: Sequence[RewardInput]) -> ScoreReply:
        """Score outputs with a reward of the gateway.

        Raises:
            RewardError: It could not be computed for all of them.
        """
        body = {"inputs": [{"prompt": item.prompt, "output": item.output} for item in inputs]}
        response = self._admin("POST", f"/admin/rewards/{quote(reward, safe='')}/score", body)
        try:
            reply = ScoreReply.model_validate(response.json())
        except ValueError as exc:
            raise RewardError(f"the gateway's scores of the reward {reward!r} are not readable: {exc}") from exc
        return ScoreReply(rewards=check_scores(reward, reply.rewards, len(inputs)), version=reply.version)

    def register(self, name: str, path: str) -> VersionId:
        """Register a version directory that the gateway can read; returns the version's id."""
        response = self._admin("POST", "/admin/adapters", {"name": name, "path": path})
        return _parse(_Registered, response).version

    def retire(self, name: str, version: VersionId) -> None:
        """Retire a version: new requests can no longer name it."""
        self._admin("POST", f"/admin/adapters/{quote(name, safe='')}/versions/{version}/retire", {})

    def route(self, name: str) -> dict[str, Any]:
        """A route as `GET /admin/routes/{name}` tells it."""
        path = f"/admin/routes/{quote(name, safe='')}"
        answer = self._http.call("GET", path, headers=self._admin_headers, json=None).json()
        if not isinstance(answer, dict):
            raise EngineError(f"the gateway's answer about the route {name!r} is not an object")
        return answer

    def base_identity(self) -> str | None:
        """What the engine tells of the base model that it has loaded; None where it is away."""
        answer = self._http.call("GET", "/admin/engines", headers=self._admin_headers, json=None)
        engines = _parse(_Engines, answer).data
        return engines[0].status.base_identity if engines and engines[0].status is not None else None

    def activate(self, route: str, name: str, version: VersionId, alpha: float) -> None:
        """Point a route at a version."""
        body = {"adapter": name, "version": version, "alpha": alpha}
        self._admin("POST", f"/admin/routes/{quote(route, safe='')}/activate", body)

    def promote(
        self, route: str, name: str, version: VersionId, alpha: float, *, percent: float, is_forced: bool
    ) -> None:
        """Let a share of a route's requests try a version; the gateway then promotes it or rolls it back."""
        body = {"adapter": name, "version": version, "alpha": alpha, "percent": percent, "force": is_forced}
        self._admin("POST", f"/admin/routes/{quote(route, safe='')}/promote", body)

    def claim_job(self, worker: str) -> TrainingJob | None:
        """Take the oldest waiting training job; None when there is none."""
        response = self._admin("POST", "/admin/training-jobs/claim", {"worker": worker}, repeatable=False)
        return None if response.status_code == 204 else _parse(TrainingJob, response)

    def heartbeat(self, job: TrainingJob, worker: str, news: Mapping[str, Any]) -> TrainingJob:
        """Say that the worker is still at it; the job's state in the answer may be `cancelled`.

        Args:
            job: As it was claimed.
            worker: The worker's name.
            news: `progress` and the new lines of `log` and `metrics`, see `JobFeed.body`.
        """
        return _parse(TrainingJob, self._of_job(job, "heartbeat", {"worker": worker, **news}))

    def release_job(self, job: TrainingJob, worker: str) -> None:
        """Give a job back for another worker to go on with."""
        self._of_job(job, "release", {"worker": worker})

    def finish_job(
        self,
        job: TrainingJob,
        worker: str,
        *,
        state: str,
        version: str | None = None,
        evaluation: Mapping[str, Any] | None = None,
        error: str | None = None,
    ) -> None:
        """Report how a job ended."""
        body = {"worker": worker, "state": state}
        extra = {"version": version, "evaluation": evaluation, "error": error}
        body |= {key: value for key, value in extra.items() if value is not None}  # type: ignore[misc]
        self._of_job(job, "finish", body)

    def _of_job(self, job: TrainingJob, action: str, body: Mapping[str, Any]) -> httpx.Response:
        attempt = {} if job.attempt is None else {"attempt": job.attempt}
        return self._admin("POST", f"/admin/training-jobs/{quote(job.id, safe='')}/{action}", {**body, **attempt})

    def _admin(self, method: str, path: str, body: Mapping[str, Any], *, repeatable: bool = True) -> httpx.Response:
        return self._http.call(method, path, headers=self._admin_headers, json=body, repeatable=repeatable)


def _bearer(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def _parse(model: type[_Model], response: httpx.Response) -> _Model:
    try:
        return model.model_validate(response.json())
    except ValueError as exc:
        raise EngineError(f"the gateway's answer to {response.request.url.path} is not readable: {exc}") from exc


def _completions(answer: Any) -> list[Completion]:
    try:
        choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
        return [
            Completion(
                text=str(choice["text"]),
                prompt_token_ids=[int(token) for token in choice["prompt_token_ids"]],
                token_ids=[int(token) for token in choice["token_ids"]],
                finish_reason=choice.get("finish_reason"),
                steered_logprobs=_logprobs(choice, "steered"),
                base_logprobs=_logprobs(choice, "base"),
            )
            for choice in choices
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise EngineError(f"the gateway's completion lacks what training needs ({type(exc).__name__}: {exc})") from exc


def _logprobs(choice: Mapping[str, Any], origin: str) -> tuple[float, ...] | None:
    """One log-probability per token of the choice; None where they are not all there."""
    values = (choice.get("steering_logprobs") or {}).get(origin)
    if values is None or len(values) != len(choice["token_ids"]):
        return None
    return tuple(float(value) for value in values)
