"""Prometheus metrics, named like vLLM's with the prefix `trimtab:`. One registry per application."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from trimtab_adapters.contract.engine_api import EngineStatus
from trimtab_server.adapter_metrics import EngineCollector, OutcomeMetrics
from trimtab_server.decoding.choice_delta import ChoiceDelta
from trimtab_server.decoding.job import GenerationJob, JobResult
from trimtab_server.decoding.usage import total_usage
from trimtab_server.errors import error_answer
from trimtab_server.reward_metrics import RewardMetrics
from trimtab_server.sse import ClientDisconnectedError
from trimtab_server.storage.base import ResolvedModel

_FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_KL = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16)


class Metrics:
    """All metrics of one gateway."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        model = ["model_name"]

        def counter(name: str, text: str, labels: Sequence[str] = model) -> Counter:
            return Counter(f"trimtab:{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"trimtab:{name}", text, model, buckets=buckets, registry=self.registry)

        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens, each prompt counted once.")
        self.generation_tokens = counter("generation_tokens", "Generated tokens of all candidates.")
        self.reference_tokens = counter("reference_tokens", "Generated tokens of reference rollouts.")
        self.candidates = counter("candidates", "Generated candidates, chosen or not.")
        self.success = counter("request_success", "Finished choices by finish reason.", [*model, "finished_reason"])
        self.errors = counter("request_errors", "Failed requests.", ["endpoint", "status", "code"])
        self.disconnects = counter("request_disconnects", "Requests whose client went away.", ["endpoint"])
        self.rollouts = counter("rollouts_logged", "Rollouts handed to the log.")
        self.selected = counter(
            "selection_candidates",
            "Candidates of requests that select, by strategy and what became of them.",
            [*model, "strategy", "state"],
        )
        self.steered_tokens = counter("steered_tokens", "Tokens sampled with steering, of recorded candidates.")
        self.flipped_tokens = counter("flipped_tokens", "Tokens at which steering changed the most probable one.")
        self.running = Gauge("trimtab:num_requests_running", "Requests being answered.", model, registry=self.registry)
        self.first_token = histogram("time_to_first_token_seconds", "Of streamed requests.", _FIRST_TOKEN)
        self.between_tokens = histogram("inter_token_latency_seconds", "Of streamed choices.", _BETWEEN_TOKENS)
        self.whole = histogram("e2e_request_latency_seconds", "From admission to the last byte.", _WHOLE)
        self.kl = histogram("steering_kl_nats", "Mean KL(steered || base) per token of a candidate.", _KL)
        self.outcomes = OutcomeMetrics(self.registry)
        self.rewards = RewardMetrics(self.registry)

    def watch_engine(self, last_status: Callable[[], EngineStatus | None]) -> None:
        """Show what an engine last said of its adapter versions. Call it once."""
        self.registry.register(EngineCollector(last_status))

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)

    def fail(self, endpoint: str, error: BaseException) -> None:
        """Count a failed request."""
        if isinstance(error, ClientDisconnectedError | asyncio.CancelledError | OSError):
            self.disconnects.labels(endpoint).inc()
            return
        answer = error_answer(error)
        self.errors.labels(endpoint, str(answer.status), answer.error["code"] or answer.error["type"]).inc()


class RequestObserver(Protocol):
    """Whoever wants to know what comes of requests, such as the watcher of canaries."""

    def answered(self, result: JobResult) -> None:
        """A request was answered."""
        ...

    def failed(self, resolved: ResolvedModel, error: BaseException) -> None:
        """A request failed, or its client went away."""
        ...


class RequestTimer:
    """Follows one admitted request. `end` must be called exactly once.

    Args:
        metrics: Where it is counted.
        job: The request.
        observer: Told what came of it as well.
    """

    def __init__(self, metrics: Metrics, job: GenerationJob, observer: RequestObserver | None = None) -> None:
        self._metrics = metrics
        self._resolved = job.resolved
        self._observer = observer
        self._model = job.resolved.model
        self._endpoint = job.endpoint
        self._started = time.perf_counter()
        self._last_token_at: dict[int, float] = {}
        metrics.running.labels(self._model).inc()

    def piece(self, piece: ChoiceDelta) -> None:
        """A piece of a stream was passed on."""
        if not piece.delta.token_ids:
            return
        now = time.perf_counter()
        if not self._last_token_at:
            self._metrics.first_token.labels(self._model).observe(now - self._started)
        if (last := self._last_token_at.get(piece.index)) is not None:
            self._metrics.between_tokens.labels(self._model).observe((now - last) / len(piece.delta.token_ids))
        self._last_token_at[piece.index] = now

    def result(self, result: JobResult, *, is_logged: bool) -> None:
        """The answer is complete."""
        if self._observer is not None:
            self._observer.answered(result)
        metrics, model, usage = self._metrics, self._model, total_usage(result.prompts)
        metrics.prompt_tokens.labels(model).inc(usage["prompt_tokens"])
        metrics.generation_tokens.labels(model).inc(usage["completion_tokens"])
        metrics.reference_tokens.labels(model).inc(usage.get("reference_tokens", 0))
        for _, selection in result.choices():
            metrics.success.labels(model, selection.candidate.finish_reason or "unknown").inc()
        for prompt in result.prompts:
            metrics.candidates.labels(model).inc(len(prompt.selections))
            if (request := result.job.selection) is not None:
                for selection in prompt.selections:
                    metrics.selected.labels(model, request.strategy, selection.state).inc()
            if is_logged:
                metrics.rollouts.labels(model).inc(len(prompt.selections) + len(prompt.references))
            for candidate in prompt.candidates:
                if (record := candidate.record) is not None and record.kl and candidate.is_steered:
                    metrics.outcomes.observe(result.job.active_adapters, record)
                    metrics.steered_tokens.labels(model).inc(record.num_tokens)
                    metrics.flipped_tokens.labels(model).inc(sum(record.flipped))
                    metrics.kl.labels(model).observe(sum(record.kl) / len(record.kl))

    def end(self, error: BaseException | None) -> None:
        """The request is over."""
        self._metrics.running.labels(self._model).dec()
        self._metrics.whole.labels(self._model).observe(time.perf_counter() - self._started)
        if error is not None:
            self._metrics.fail(self._endpoint, error)
            if self._observer is not None:
                self._observer.failed(self._resolved, error)
