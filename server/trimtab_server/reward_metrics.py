"""Metrics of rewards, by their names."""

from prometheus_client import CollectorRegistry, Counter, Histogram

from trimtab_adapters.contract.errors import RewardError

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class RewardMetrics:
    """Time, failures and cache hits; a `RewardObserver`.

    Args:
        registry: Where the metrics are registered.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        label = ["reward"]
        self.seconds = Histogram(
            "trimtab:reward_seconds",
            "Time of answered calls, with waiting in the queue.",
            label,
            buckets=_SECONDS,
            registry=registry,
        )
        self.scores = Counter("trimtab:reward_scores", "Scores given.", label, registry=registry)
        self.cache_hits = Counter("trimtab:reward_cache_hits", "Scores from the cache.", label, registry=registry)
        self.attempts = Counter("trimtab:reward_attempts", "Batches tried, again or not.", label, registry=registry)
        self.errors = Counter(
            "trimtab:reward_errors", "Those that failed, by the code of the error.", [*label, "code"], registry=registry
        )

    def attempt(self, reward: str, error: RewardError | None) -> None:
        """A batch was tried."""
        self.attempts.labels(reward).inc()
        if error is not None:
            self.errors.labels(reward, error.code or "unknown").inc()

    def call(self, reward: str, *, num_inputs: int, num_cached: int, duration_s: float) -> None:
        """A call was answered."""
        self.seconds.labels(reward).observe(duration_s)
        self.scores.labels(reward).inc(num_inputs)
        self.cache_hits.labels(reward).inc(num_cached)
