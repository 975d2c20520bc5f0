"""Metrics per adapter version: what its steering did to the tokens, and what it costs in the engine.

Several adapters in one steering cannot be told apart by its outcome, so each of them gets the whole KL and every flip
of the tokens at which it ran. Labels are the adapter's name and its version.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from typing_extensions import override

from trimtab_adapters.contract.engine_api import EngineStatus, LoadedVersion, ProviderStatus, VersionActivity
from trimtab_adapters.contract.params import AdapterWeight
from trimtab_adapters.contract.records import SteeringRecord

LABELS = ["adapter", "version"]
_KL = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16)

_ACTIVITY = {
    "steps": ("adapter_steps", "Forward passes of the adapter LM."),
    "step_seconds": ("adapter_step_seconds", "Time in forward passes of the adapter LM, prefill included."),
    "rows": ("adapter_rows", "Rows of these passes: tokens that the version steered."),
    "hit_tokens": ("adapter_cache_hit_tokens", "Tokens that the adapter LM's KV cache had."),
    "computed_tokens": ("adapter_computed_tokens", "Tokens that the adapter LM computed."),
    "recomputed_tokens": ("adapter_recomputed_tokens", "Tokens computed again after their cache was given up."),
}
"""Field of `VersionActivity` -> name and text of its counter."""


class OutcomeMetrics:
    """What steering did to the tokens of recorded candidates, per adapter version.

    Args:
        registry: Where the metrics are registered.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.kl = Histogram(
            "trimtab:adapter_kl_nats",
            "KL(steered || base) per token at which the version ran.",
            LABELS,
            buckets=_KL,
            registry=registry,
        )
        self.tokens = Counter(
            "trimtab:adapter_steered_tokens", "Recorded tokens at which the version ran.", LABELS, registry=registry
        )
        self.flipped = Counter(
            "trimtab:adapter_flipped_tokens", "Those at which steering flipped the argmax.", LABELS, registry=registry
        )

    def observe(self, adapters: Sequence[AdapterWeight], record: SteeringRecord) -> None:
        """Take the record of one candidate in.

        Args:
            adapters: Those of the steering with a non-zero alpha, in the record's order.
            record: Checked; nothing happens when it has no log-probabilities.
        """
        for weight, logprobs in zip(adapters, record.adapter_logprobs, strict=False):
            ran = [i for i, logprob in enumerate(logprobs) if logprob is not None]
            if not ran:
                continue
            labels = (weight.name, weight.version)
            kl = self.kl.labels(*labels)
            for i in ran:
                kl.observe(record.kl[i])
            self.tokens.labels(*labels).inc(len(ran))
            self.flipped.labels(*labels).inc(sum(record.flipped[i] for i in ran))


_PROVIDER = {
    "calls": "Calls to the API of the black-box base that were answered.",
    "retries": "Further attempts at calls.",
    "failed_calls": "Calls without a useful answer in all attempts.",
    "prompt_tokens": "Prompt tokens that it billed.",
    "completion_tokens": "Generated tokens that it billed.",
    "cached_tokens": "Of its prompt tokens, those from its cache.",
    "unmapped_tokens": "Tokens that it showed and that the gateway's tokenizer does not know.",
    "resplit_calls": "Calls whose prompt it split into another number of tokens than the gateway.",
}


@dataclass(slots=True)
class _Total:
    """Sums of one version since the engine started: of the loads that ended, and of the current one."""

    name: str
    ended: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_ACTIVITY, 0.0))
    current: VersionActivity = field(default_factory=VersionActivity)

    def see(self, activity: VersionActivity) -> None:
        """A version that was freed and loaded again counts from 0; what it did before still counts."""
        if any(getattr(activity, name) < getattr(self.current, name) for name in _ACTIVITY):
            for name in _ACTIVITY:
                self.ended[name] += getattr(self.current, name)
        self.current = activity

    def sum(self, name: str) -> float:
        """Of all loads."""
        return float(self.ended[name] + getattr(self.current, name))


class EngineCollector(Collector):
    """What the engine last said of its adapter versions; never asks it, so a scrape works while it is down.

    Counters only grow as long as the engine process lives, and begin anew with the next one. Those of a version that
    was freed stay until then; its gauges go.

    Args:
        last_status: For example `Residency.last_status`.
    """

    def __init__(self, last_status: Callable[[], EngineStatus | None]) -> None:
        self._last_status = last_status
        self._boot_id: str | None = None
        self._totals: dict[str, _Total] = {}

    @override
    def collect(self) -> Iterator[Metric]:
        """The metrics; none before the engine first answered."""
        status = self._last_status()
        if status is None:
            return
        self._see(status)
        for field_name, (name, text) in _ACTIVITY.items():
            counter = CounterMetricFamily(f"trimtab:{name}", text, labels=LABELS)
            for version, total in self._totals.items():
                counter.add_metric([total.name, version], total.sum(field_name))
            yield counter
        yield _gauge("adapter_weight_bytes", "Weights of its own.", status, lambda v: v.weight_bytes)
        yield _gauge("adapter_cache_bytes", "Blocks of the KV cache with its values.", status, lambda v: v.cache_bytes)
        yield _gauge("adapter_active_rows", "Rows that it steers now.", status, lambda v: v.active_rows)
        if status.provider is not None:
            yield from _provider(status.provider)

    def describe(self) -> list[Metric]:
        """Nothing that would need the engine's status when the collector is registered."""
        return []

    def _see(self, status: EngineStatus) -> None:
        if status.boot_id != self._boot_id:
            self._boot_id, self._totals = status.boot_id, {}
        for version in status.versions:
            self._totals.setdefault(version.version, _Total(version.name)).see(version.activity)


def _provider(provider: ProviderStatus) -> Iterator[Metric]:
    """What the API of a black-box base was asked and billed."""
    for field_name, text in _PROVIDER.items():
        yield CounterMetricFamily(f"trimtab:black_box_{field_name}", text, getattr(provider, field_name))
    is_open = float(provider.breaker != "closed")
    yield GaugeMetricFamily("trimtab:black_box_breaker_open", "1 while it is not asked because it was away.", is_open)


def _gauge(name: str, text: str, status: EngineStatus, value: Callable[[LoadedVersion], float]) -> Metric:
    gauge = GaugeMetricFamily(f"trimtab:{name}", text, labels=LABELS)
    for version in status.versions:
        gauge.add_metric([version.name, version.version], value(version))
    return gauge
