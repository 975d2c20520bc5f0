"""Metrics of the engine's adapter memory, read from the residency when they are scraped."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from typing_extensions import override

from trimtab_server.engine.residency import Residency


class ResidencyCollector(Collector):
    """Counters of loads, evictions, waits and refusals; gauges of what is resident.

    Args:
        residency: Of the one engine behind this gateway.
    """

    def __init__(self, residency: Residency) -> None:
        self._residency = residency

    @override
    def collect(self) -> Iterator[Metric]:
        """All families. The budget is left out where the engine has none."""
        residency, counters = self._residency, self._residency.counters
        for name, text, total in (
            ("adapter_loads", "Adapter versions loaded into the engine.", counters.loads),
            ("adapter_evictions", "Adapter versions retired to make room for others.", counters.evictions),
            ("adapter_memory_waits", "Requests that had to wait for adapter memory.", counters.waits),
            ("adapter_memory_refusals", "Requests refused for want of adapter memory.", counters.refusals),
        ):
            yield CounterMetricFamily(f"trimtab:{name}", text, total)
        status = residency.last_status
        yield GaugeMetricFamily(
            "trimtab:adapter_versions_resident", "Usable adapter versions.", len(residency.committed)
        )
        yield GaugeMetricFamily("trimtab:adapter_memory_waiting", "Requests waiting now.", residency.num_waiting)
        yield GaugeMetricFamily("trimtab:adapter_memory_used_bytes", "Taken or promised.", residency.used_bytes)
        if status is not None and status.weights.budget_bytes is not None:
            budget = status.weights.budget_bytes
            yield GaugeMetricFamily("trimtab:adapter_memory_budget_bytes", "The engine's --adapter-memory.", budget)
