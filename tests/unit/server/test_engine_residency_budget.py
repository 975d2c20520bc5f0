"""An engine with a budget for adapter memory: who is loaded, who goes, who waits."""

import asyncio
import contextlib
import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from typing_extensions import override

from fake_gateway import MemoryCatalog, adapter_version, asgi_client, build_gateway
from trimtab_adapters.contract.engine_api import LoadedVersion, RetireReply
from trimtab_adapters.contract.errors import AdapterMemoryFullError, InvalidRequestError, WeightsError
from trimtab_adapters.contract.params import AdapterWeight
from trimtab_server.engine.adapter_memory import AdapterMemory
from trimtab_server.engine.fake import FakeEngine
from trimtab_server.engine.residency import Residency
from trimtab_server.storage.base import AdapterVersion

pytestmark = pytest.mark.anyio

BUDGET = 5


def vid(number: int) -> str:
    return f"{number:016x}"


class WatchedEngine(FakeEngine):
    """Fails the test when it is asked for more than its budget, or to free what is in use or kept."""

    residency: Residency
    catalog: MemoryCatalog
    takes_time = False

    @override
    async def prepare(self, version: str, path: str) -> LoadedVersion:
        if self.takes_time:
            await asyncio.sleep(0.0005)
        loaded = await super().prepare(version, path)
        assert self.used_weight_bytes <= (self.weight_budget_bytes or 1 << 60)
        return loaded

    @override
    async def retire(self, version: str) -> RetireReply:
        assert self.residency.in_flight(version) == 0
        assert not self.catalog.is_kept(version)
        if self.takes_time:
            await asyncio.sleep(0.0005)
        return await super().retire(version)


class Bench:
    """A residency over a watched engine and a catalog with so many versions, none of them on a route."""

    def __init__(self, num_versions: int, budget: int | None = BUDGET, **options: Any) -> None:
        self.catalog = MemoryCatalog()
        self.catalog.revisions.clear()
        self.catalog.adapters = {f"a{n}": adapter_version(f"a{n}", vid(n)) for n in range(num_versions)}
        self.engine = WatchedEngine(weight_budget_bytes=budget)
        self.residency = Residency(self.engine, self.catalog, **options)
        self.engine.residency, self.engine.catalog = self.residency, self.catalog

    def route(self, number: int) -> None:
        term = AdapterWeight(name=f"a{number}", version=vid(number), alpha=1.0)
        self.catalog.add_route(f"r{number}", steering=(term,))

    async def use(self, *numbers: int, seconds: float = 0.0, wait_s: float | None = None) -> None:
        async with self.residency.pin(map(vid, numbers), wait_s=wait_s):
            for number in numbers:
                assert self.engine.versions[vid(number)].state == "committed"
            await asyncio.sleep(seconds)
            for number in numbers:
                assert self.engine.versions[vid(number)].state == "committed"

    @property
    def resident(self) -> set[int]:
        return {int(version, 16) for version, loaded in self.engine.versions.items() if loaded.state == "committed"}


async def settle(tasks: Iterable["asyncio.Task[None]"]) -> None:
    async with asyncio.timeout(20):
        await asyncio.gather(*tasks)


async def test_the_least_recently_used_version_makes_room() -> None:
    bench = Bench(10)
    for number in (0, 1, 2, 3, 4, 0, 5):
        await bench.use(number)
    assert bench.resident == {0, 2, 3, 4, 5}
    await bench.use(6, 7)
    assert bench.resident == {0, 4, 5, 6, 7}
    counters = bench.residency.counters
    assert (counters.loads, counters.evictions, counters.refusals) == (8, 3, 0)
    assert bench.residency.used_bytes == BUDGET


@pytest.mark.parametrize("seed", range(6))
async def test_random_requests_for_200_versions_are_all_answered_within_the_budget(seed: int) -> None:
    rng = random.Random(seed)
    bench = Bench(200, wait_s=20.0, patience_s=rng.choice([0.0, 0.01]))
    bench.engine.takes_time = True
    bench.route(0)
    bench.catalog.adapters["a1"] = replace(bench.catalog.adapters["a1"], pinned_at=1.0)
    await bench.residency.converge()
    num_answered = 0

    async def user() -> None:
        nonlocal num_answered
        for _ in range(8):
            numbers = {int(rng.paretovariate(0.5)) % 200 for _ in range(rng.choice([1, 1, 2, 3]))}
            await bench.use(*numbers, seconds=rng.choice([0.0, 0.0, 0.001, 0.003]))
            num_answered += 1

    await settle(asyncio.create_task(user()) for _ in range(40))
    assert num_answered == 320
    assert {0, 1} <= bench.resident, "what is kept was never evicted"
    assert len(bench.resident) <= BUDGET
    assert bench.residency.num_waiting == 0
    assert bench.residency.counters.evictions > 20
    assert bench.residency.counters.refusals == 0


async def test_requests_cancelled_at_random_leave_nothing_behind() -> None:
    rng = random.Random(3)
    bench = Bench(30, wait_s=20.0, patience_s=0.0)
    bench.engine.takes_time = True

    async def one() -> None:
        await bench.use(*{rng.randrange(30) for _ in range(3)}, seconds=0.002)

    for _ in range(30):
        tasks = [asyncio.create_task(one()) for _ in range(8)]
        await asyncio.sleep(rng.random() * 0.004)
        for task in rng.sample(tasks, 5):
            task.cancel()
        await settle(asyncio.create_task(_swallow(task)) for task in tasks)
    assert bench.residency.num_waiting == 0
    assert not any(bench.residency.in_flight(vid(number)) for number in range(30))
    await bench.use(0, 1, 2, 3, 4)


async def _swallow(task: "asyncio.Task[None]") -> None:
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_requests_with_several_versions_cannot_wait_for_each_other() -> None:
    bench = Bench(3, budget=2, wait_s=20.0)
    pairs = [(0, 1), (1, 2), (2, 0)] * 20
    await settle(asyncio.create_task(bench.use(*pair, seconds=0.001)) for pair in pairs)


async def test_one_who_fits_need_not_wait_for_one_who_does_not() -> None:
    bench = Bench(6, budget=2, wait_s=20.0, patience_s=20.0)
    first = asyncio.create_task(bench.use(0, 1, seconds=0.1))
    await asyncio.sleep(0.02)
    second = asyncio.create_task(bench.use(2))
    await asyncio.sleep(0.01)
    assert bench.residency.num_waiting == 1
    await bench.use(0)
    assert not first.done()
    await settle([first, second])
    assert bench.residency.counters.waits == 1


async def test_steady_traffic_to_what_is_loaded_does_not_keep_others_out() -> None:
    # A clock that stands still, or all would pause together whenever the engine is asked for its status.
    bench = Bench(3, budget=1, wait_s=20.0, patience_s=0.05, clock=lambda: 0.0)
    is_over = False

    async def hot(number: int) -> None:
        await asyncio.sleep(number * 0.002)  # so that at no time all of them have just ended
        while not is_over:
            await bench.use(0, seconds=0.01)

    tasks = [asyncio.create_task(hot(number)) for number in range(5)]
    await asyncio.sleep(0.03)
    async with asyncio.timeout(5):
        await bench.use(1)
        await bench.use(2)
    is_over = True
    await settle(tasks)
    assert bench.residency.counters.refusals == 0


async def test_when_everything_stays_in_use_the_request_is_refused_and_told_when_to_come_again() -> None:
    bench = Bench(3, budget=2)
    bench.route(0)
    await bench.use(0)
    async with bench.residency.pin([vid(1)]):
        with pytest.raises(AdapterMemoryFullError, match="all 2 bytes") as caught:
            await bench.use(2, wait_s=0.01)
        assert (caught.value.status, caught.value.code) == (503, "adapter_memory_full")
        assert bench.residency.counters.refusals == 1
    await bench.use(2, wait_s=0.01)
    assert bench.resident == {0, 2}


async def test_a_pinned_version_stays_until_it_is_unpinned() -> None:
    bench = Bench(3, budget=1)
    kept = bench.catalog.adapters["a0"]
    bench.catalog.adapters["a0"] = replace(kept, pinned_at=5.0)
    await bench.residency.converge()
    with pytest.raises(AdapterMemoryFullError):
        await bench.use(1, wait_s=0.0)
    bench.catalog.adapters["a0"] = kept
    await bench.use(1, wait_s=0.0)
    assert bench.resident == {1}


async def test_versions_that_never_fit_together_are_refused_at_once() -> None:
    bench = Bench(3, budget=2)
    for number in range(3):
        await bench.use(number)
    with pytest.raises(InvalidRequestError, match="do not fit together") as caught:
        await bench.use(0, 1, 2)
    assert (caught.value.param, caught.value.code) == ("steering", "adapter_too_large")


def test_a_lora_refused_together_with_its_lm_is_not_impossible_when_another_has_brought_the_lm() -> None:
    memory = AdapterMemory(lambda version: False)
    memory.budget_bytes = 19
    memory.learn_size(vid(1), 11)  # as the engine said when it refused: 1, and 10 of the LM
    memory.shared_bytes = 10  # the LM, which came with another LoRA
    assert not memory.is_impossible({vid(1)})
    assert memory.lacking_bytes({vid(1)}) <= 0
    memory.learn_size(vid(1), 20)
    assert memory.is_impossible({vid(1)})


async def test_a_version_larger_than_its_files_is_loaded_when_the_engine_has_said_how_large() -> None:
    bench = Bench(8)
    bench.engine.weight_bytes = lambda version: 3
    for number in (0, 1, 2, 0):
        await bench.use(number)
    assert len(bench.resident) == 1
    assert bench.residency.used_bytes == 3


async def test_smaller_than_its_files_leaves_room_for_others() -> None:
    bench = Bench(8, budget=2)
    bench.catalog.adapters["a0"] = _with_file_bytes(bench.catalog.adapters["a0"].name, 0, 100)
    await bench.use(0)
    await bench.use(1)
    assert bench.resident == {0, 1}


def _with_file_bytes(name: str, number: int, num_bytes: int) -> AdapterVersion:
    version = adapter_version(name, vid(number))
    files = version.manifest.files | {
        "model.safetensors": version.manifest.files["config.json"].model_copy(update={"size_bytes": num_bytes})
    }
    return replace(version, manifest=version.manifest.model_copy(update={"files": files}))


async def test_a_version_wanted_again_while_it_makes_room_is_loaded_again() -> None:
    began, gate = asyncio.Event(), asyncio.Event()
    bench = Bench(2, budget=1, wait_s=20.0)
    plain = bench.engine.retire

    async def slow(version: str) -> RetireReply:
        began.set()
        await gate.wait()
        return await plain(version)

    bench.engine.retire = slow  # type: ignore[method-assign]
    await bench.use(0)
    other = asyncio.create_task(bench.use(1))
    await began.wait()
    again = asyncio.create_task(bench.use(0))
    await asyncio.sleep(0)
    gate.set()
    await settle([other, again])
    assert bench.resident == {0}


async def test_memory_is_not_free_before_rows_that_were_given_up_have_ended() -> None:
    bench = Bench(2, budget=1, wait_s=20.0)
    plain, num_asked = bench.engine.retire, 0

    async def busy(version: str) -> RetireReply:
        nonlocal num_asked
        num_asked += 1
        return await plain(version) if num_asked > 2 else RetireReply(version=version, freed=False, active_rows=1)

    bench.engine.retire = busy  # type: ignore[method-assign]
    await bench.use(0)
    await bench.use(1)
    assert (num_asked, bench.resident) == (3, {1})
    assert [call for call in bench.engine.observed.calls if call == ("prepare", vid(1))] == [("prepare", vid(1))]


async def test_what_a_broken_gateway_left_behind_is_given_back() -> None:
    bench = Bench(3, budget=2)
    await bench.engine.prepare(vid(2), "/left/behind")  # and never committed
    await bench.use(0, 1)
    assert set(bench.engine.versions) == {vid(0), vid(1)}


async def test_a_restarted_engine_gets_what_is_kept_and_the_rest_on_demand() -> None:
    bench = Bench(6)
    bench.route(0)
    for number in (0, 1, 2):
        await bench.use(number)
    bench.engine.restart()
    bench.residency.forget()
    await bench.residency.converge()
    assert bench.resident == {0}
    await bench.use(1)
    assert bench.resident == {0, 1}


async def test_a_refused_version_gives_its_room_back() -> None:
    bench = Bench(3, budget=1)
    bench.engine.refuse_version = lambda version: WeightsError("NaN") if version == vid(0) else None
    with pytest.raises(WeightsError):
        await bench.use(0)
    assert bench.residency.used_bytes == 0
    await bench.use(1)


async def test_trying_a_version_out_makes_room_and_leaves_none_taken() -> None:
    bench = Bench(2, budget=1)
    await bench.use(0)
    await bench.residency.try_out(adapter_version("new", vid(99)))
    assert bench.resident == set()
    assert bench.residency.describe(vid(99)).state == "on_disk"


async def test_where_a_version_is_can_be_told() -> None:
    bench = Bench(2)
    bench.engine.load_gate.clear()
    task = asyncio.create_task(bench.use(0, seconds=0.01))
    while not bench.engine.versions:
        await asyncio.sleep(0)
    assert (bench.residency.describe(vid(0)).state, bench.residency.describe(vid(0)).weight_bytes) == ("loading", 1)
    bench.engine.load_gate.set()
    await settle([task])
    here = bench.residency.describe(vid(0))
    assert (here.state, here.weight_bytes, here.in_flight) == ("resident", 1, 0)
    assert bench.residency.describe(vid(1)).state == "on_disk"


async def test_without_a_budget_nothing_is_evicted() -> None:
    bench = Bench(50, budget=None)
    await settle(asyncio.create_task(bench.use(number)) for number in range(50))
    assert len(bench.resident) == 50
    assert bench.residency.counters.evictions == bench.residency.counters.waits == 0


async def test_a_caller_is_told_and_the_metrics_show_it() -> None:
    gateway = build_gateway(fake=FakeEngine(weight_budget_bytes=1))
    gateway.residency._wait_s = 0.01
    await gateway.residency.converge()  # the route `kind` takes all
    async with asgi_client(gateway.app) as client:
        body = {"model": "base", "prompt": "a", "steering": {"adapters": [{"name": "plain"}]}}
        answer = await client.post("/v1/completions", json=body)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
        assert answer.json()["error"]["code"] == "adapter_memory_full"
        metrics = (await client.get("/metrics")).text
    for line in (
        "trimtab:adapter_loads_total 1.0",
        "trimtab:adapter_evictions_total 0.0",
        "trimtab:adapter_memory_waits_total 1.0",
        "trimtab:adapter_memory_refusals_total 1.0",
        "trimtab:adapter_versions_resident 1.0",
        "trimtab:adapter_memory_used_bytes 1.0",
        "trimtab:adapter_memory_budget_bytes 1.0",
    ):
        assert line in metrics
