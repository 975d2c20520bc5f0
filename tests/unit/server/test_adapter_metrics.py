"""Metrics per adapter version: outcomes of recorded candidates, and what the engine last said of its versions."""

from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from fake_gateway import KIND, PLAIN, FakeGateway, asgi_client, build_gateway
from trimtab_adapters.contract.engine_api import EngineStatus, LoadedVersion, VersionActivity
from trimtab_adapters.contract.params import AdapterWeight
from trimtab_adapters.contract.records import SteeringRecord
from trimtab_server.adapter_metrics import EngineCollector, OutcomeMetrics
from trimtab_server.engine.fake import FakeEngine

A, B = (AdapterWeight(name=name, version=version, alpha=1.0) for name, version in (("kind", KIND), ("plain", PLAIN)))
LABELS = {"adapter": "kind", "version": KIND}


def record(adapters: list[list[float | None]], kl: list[float], flipped: list[bool]) -> SteeringRecord:
    n = len(kl)
    return SteeringRecord(uid="u", num_tokens=n, kl=kl, flipped=flipped, adapter_logprobs=adapters)


def test_each_adapter_gets_the_tokens_at_which_it_ran() -> None:
    registry = CollectorRegistry()
    metrics = OutcomeMetrics(registry)
    metrics.observe([A, B], record([[-1.0, -1.0, None], [-1.0, None, None]], [0.02, 0.3, 9.0], [True, True, False]))
    metrics.observe([A], record([[-1.0]], [0.0005], [False]))

    def value(name: str, version: str, **more: str) -> float | None:
        adapter = "kind" if version == KIND else "plain"
        return registry.get_sample_value(f"trimtab:{name}", {"adapter": adapter, "version": version, **more})

    assert (value("adapter_steered_tokens_total", KIND), value("adapter_steered_tokens_total", PLAIN)) == (3.0, 1.0)
    assert (value("adapter_flipped_tokens_total", KIND), value("adapter_flipped_tokens_total", PLAIN)) == (2.0, 1.0)
    assert value("adapter_kl_nats_sum", KIND) == pytest.approx(0.3205)
    assert [value("adapter_kl_nats_bucket", KIND, le=le) for le in ("0.001", "0.05", "0.5", "+Inf")] == [1, 2, 3, 3]
    assert value("adapter_kl_nats_count", PLAIN) == 1.0


def test_a_record_without_logprobs_counts_nothing() -> None:
    registry = CollectorRegistry()
    OutcomeMetrics(registry).observe([A], record([], [], []))
    assert registry.get_sample_value("trimtab:adapter_steered_tokens_total", LABELS) is None


class Engine:
    """An engine whose last status tests change."""

    def __init__(self) -> None:
        self.status: EngineStatus | None = None
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(lambda: self.status))

    async def say(self, *versions: LoadedVersion, boot_id: str = "one") -> None:
        status = await FakeEngine().status()
        self.status = status.model_copy(update={"boot_id": boot_id, "versions": list(versions)})

    def value(self, name: str) -> float | None:
        return self.registry.get_sample_value(f"trimtab:{name}", LABELS)


def version(**activity: Any) -> LoadedVersion:
    return LoadedVersion(
        version=KIND,
        name="kind",
        state="committed",
        weight_bytes=100,
        cache_bytes=64,
        active_rows=2,
        activity=VersionActivity(**activity),
    )


@pytest.mark.anyio
async def test_the_engines_counters_grow_as_long_as_it_lives() -> None:
    engine = Engine()
    assert engine.value("adapter_steps_total") is None  # it never answered
    await engine.say(version(steps=5, step_seconds=0.5, rows=7, hit_tokens=3, computed_tokens=4, recomputed_tokens=1))
    names = ("steps", "step_seconds", "rows", "cache_hit_tokens", "computed_tokens", "recomputed_tokens")
    assert [engine.value(f"adapter_{name}_total") for name in names] == [5, 0.5, 7, 3, 4, 1]
    assert [engine.value(f"adapter_{name}") for name in ("weight_bytes", "cache_bytes", "active_rows")] == [100, 64, 2]
    await engine.say(version(steps=8, rows=9, hit_tokens=3, step_seconds=0.5, computed_tokens=4, recomputed_tokens=1))
    assert engine.value("adapter_steps_total") == 8
    assert engine.value("adapter_steps_total") == 8  # seeing the same twice adds nothing
    await engine.say()
    assert engine.value("adapter_steps_total") == 8
    assert engine.value("adapter_weight_bytes") is None
    await engine.say(version(steps=2))  # it was freed and loaded again
    assert engine.value("adapter_steps_total") == 10
    assert engine.value("adapter_rows_total") == 9
    await engine.say(version(steps=1), boot_id="two")
    assert engine.value("adapter_steps_total") == 1


@pytest.mark.anyio
async def test_a_gateway_shows_both_while_its_engine_is_down(gateway: FakeGateway) -> None:
    async with asgi_client(gateway.app) as client:
        body = {"model": "kind", "prompt": "Hi", "max_tokens": 3, "steering": {"schedule": {"first": 2}}}
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        gateway.engine.versions[KIND] = version(steps=4)
        gateway.residency.forget()
        await client.get("/ready")
        gateway.engine.is_up = False
        gateway.residency.forget()
        assert (await client.get("/ready")).status_code == 503
        text = (await client.get("/metrics")).text
    labels = f'{{adapter="kind",version="{KIND}"}}'
    assert f"trimtab:adapter_steered_tokens_total{labels} 2.0" in text
    assert f"trimtab:adapter_kl_nats_count{labels} 2.0" in text
    assert f"trimtab:adapter_steps_total{labels} 4.0" in text
    assert 'trimtab:steering_kl_nats_count{model_name="kind"} 1.0' in text


@pytest.mark.anyio
async def test_before_the_engine_ever_answered_there_is_nothing_of_it() -> None:
    fake = FakeEngine()
    fake.is_up = False
    async with asgi_client(build_gateway(fake=fake).app) as client:
        response = await client.get("/metrics")
    assert response.status_code == 200
    assert "adapter_steps" not in response.text
