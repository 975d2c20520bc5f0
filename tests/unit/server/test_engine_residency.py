import asyncio

import pytest
from typing_extensions import override

from fake_gateway import KIND, PLAIN, MemoryCatalog, adapter_version
from trimtab_adapters.contract.engine_api import RetireReply
from trimtab_adapters.contract.errors import (
    EngineUnavailableError,
    NotFoundError,
    TrimtabError,
    WeightsError,
)
from trimtab_adapters.contract.params import AdapterWeight
from trimtab_server.engine.fake import FakeEngine
from trimtab_server.engine.residency import STATUS_AGE_S, Residency

pytestmark = pytest.mark.anyio


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def fake() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def residency(fake: FakeEngine, clock: Clock) -> Residency:
    return Residency(fake, MemoryCatalog(), clock=clock)


def loads(fake: FakeEngine) -> list[tuple[str, str]]:
    return [call for call in fake.observed.calls if call[0] != "status"]


async def test_a_pinned_version_is_loaded_once_and_counted(residency: Residency, fake: FakeEngine) -> None:
    async with residency.pin([KIND]), residency.pin([KIND, PLAIN]):
        assert (residency.in_flight(KIND), residency.in_flight(PLAIN)) == (2, 1)
        assert residency.committed == {KIND, PLAIN}
    assert (residency.in_flight(KIND), residency.in_flight(PLAIN)) == (0, 0)
    assert loads(fake) == [("prepare", KIND), ("commit", KIND), ("prepare", PLAIN), ("commit", PLAIN)]


async def test_no_versions_ask_the_engine_nothing(residency: Residency, fake: FakeEngine) -> None:
    async with residency.pin([]):
        assert fake.observed.calls == []


async def test_concurrent_callers_share_one_load(residency: Residency, fake: FakeEngine) -> None:
    fake.load_gate.clear()

    async def use() -> None:
        async with residency.pin([KIND]):
            pass

    tasks = [asyncio.create_task(use()) for _ in range(20)]
    while not loads(fake):
        await asyncio.sleep(0)
    tasks[0].cancel()  # even when the caller that began it gives up
    await asyncio.gather(tasks[0], return_exceptions=True)
    fake.load_gate.set()
    await asyncio.gather(*tasks[1:])
    assert loads(fake) == [("prepare", KIND), ("commit", KIND)]
    assert fake.observed.calls.count(("status", "")) == 1
    assert residency.in_flight(KIND) == 0


async def test_a_version_is_tried_out_and_freed(residency: Residency, fake: FakeEngine) -> None:
    await residency.try_out(adapter_version("kind", KIND))
    assert loads(fake) == [("prepare", KIND), ("commit", KIND), ("retire", KIND)]
    assert fake.versions == {}


async def test_a_version_that_is_tried_out_again_stays_for_its_requests(residency: Residency, fake: FakeEngine) -> None:
    async with residency.pin([KIND]):
        await residency.retire(KIND)
        await residency.try_out(adapter_version("kind", KIND))
        assert fake.versions[KIND].state == "committed"


async def test_who_wants_a_version_that_is_tried_out_keeps_it(residency: Residency, fake: FakeEngine) -> None:
    fake.load_gate.clear()
    trying = asyncio.create_task(residency.try_out(adapter_version("kind", KIND)))
    while not loads(fake):
        await asyncio.sleep(0)

    async def use() -> None:
        async with residency.pin([KIND]):
            await trying
            assert fake.versions[KIND].state == "committed"

    wanting = asyncio.create_task(use())
    await asyncio.sleep(0)
    fake.load_gate.set()
    await wanting


async def test_a_refused_version_is_an_error_and_can_be_tried_out_again(residency: Residency, fake: FakeEngine) -> None:
    fake.refuse_version = lambda version: WeightsError("no")
    with pytest.raises(WeightsError):
        await residency.try_out(adapter_version("kind", KIND))
    fake.refuse_version = None
    await residency.try_out(adapter_version("kind", KIND))
    assert fake.versions == {}


async def test_a_version_that_the_engine_already_holds_is_not_loaded(residency: Residency, fake: FakeEngine) -> None:
    await fake.prepare(KIND, "/x")
    await fake.commit(KIND)
    fake.observed.calls.clear()
    async with residency.pin([KIND]):
        assert loads(fake) == []


async def test_status_is_asked_at_most_once_per_age(residency: Residency, fake: FakeEngine, clock: Clock) -> None:
    for _ in range(5):
        async with residency.pin([KIND]):
            pass
    assert fake.observed.calls.count(("status", "")) == 1
    clock.now += STATUS_AGE_S
    async with residency.pin([KIND]):
        pass
    assert fake.observed.calls.count(("status", "")) == 2


async def test_a_restarted_engine_is_loaded_again(residency: Residency, fake: FakeEngine, clock: Clock) -> None:
    await residency.ensure(KIND)
    fake.restart()
    clock.now += STATUS_AGE_S
    async with residency.pin([KIND]):
        assert fake.versions[KIND].state == "committed"


async def test_after_forget_the_engine_is_believed_and_not_memory(residency: Residency, fake: FakeEngine) -> None:
    await residency.ensure(KIND)
    fake.versions.clear()
    await residency.ensure(KIND)
    assert fake.versions == {}  # not noticed yet
    residency.forget()
    await residency.ensure(KIND)
    assert fake.versions[KIND].state == "committed"


async def test_a_refused_version_fails_its_callers_and_may_be_tried_again(
    residency: Residency, fake: FakeEngine
) -> None:
    fake.refuse_version = lambda _: WeightsError("NaN")
    for _ in range(2):
        with pytest.raises(WeightsError):
            await residency.ensure(KIND)
    assert residency.in_flight(KIND) == 0
    fake.refuse_version = None
    await residency.ensure(KIND)
    assert KIND in residency.committed


async def test_an_unknown_version_and_a_dead_engine_raise_and_leave_nothing_pinned(
    residency: Residency, fake: FakeEngine
) -> None:
    with pytest.raises(NotFoundError):
        await residency.ensure("f" * 16)
    residency.forget()
    fake.is_up = False
    with pytest.raises(EngineUnavailableError):
        await residency.ensure(KIND)
    assert residency.in_flight(KIND) == 0


async def test_retiring_an_unused_version_frees_it_at_once(residency: Residency, fake: FakeEngine) -> None:
    await residency.ensure(KIND)
    reply = await residency.retire(KIND)
    assert (reply.freed, reply.active_rows) == (True, 0)
    assert KIND not in residency.committed
    assert KIND not in fake.versions


async def test_retiring_a_version_in_use_waits_for_its_last_request(residency: Residency, fake: FakeEngine) -> None:
    async with residency.pin([KIND]):
        async with residency.pin([KIND]):
            reply = await residency.retire(KIND)
            assert (reply.freed, reply.active_rows) == (False, 2)
        assert fake.versions[KIND].state == "committed"
    async with asyncio.timeout(5):
        while KIND in fake.versions:
            await asyncio.sleep(0)
    assert loads(fake)[-1] == ("retire", KIND)


async def test_a_version_wanted_again_is_not_retired(residency: Residency, fake: FakeEngine) -> None:
    async with residency.pin([KIND]):
        await residency.retire(KIND)
        async with residency.pin([KIND]):
            pass
    await asyncio.sleep(0)
    assert ("retire", KIND) not in loads(fake)
    assert KIND in residency.committed


async def test_a_pin_during_a_retirement_loads_again_after_it(clock: Clock) -> None:
    began, gate = asyncio.Event(), asyncio.Event()

    class Slow(FakeEngine):
        @override
        async def retire(self, version: str) -> RetireReply:
            began.set()
            await gate.wait()
            return await super().retire(version)

    fake = Slow()
    residency = Residency(fake, MemoryCatalog(), clock=clock)
    await residency.ensure(KIND)
    retiring = asyncio.create_task(residency.retire(KIND))
    await began.wait()
    pinning = asyncio.create_task(residency.ensure(KIND))
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(retiring, pinning)
    assert fake.versions[KIND].state == "committed"
    assert loads(fake) == [
        *(("prepare", KIND), ("commit", KIND), ("retire", KIND)),
        *(("prepare", KIND), ("commit", KIND)),
    ]


async def test_converge_loads_what_routes_use_and_tries_all_of_it(fake: FakeEngine, clock: Clock) -> None:
    catalog = MemoryCatalog()
    broken = "c" * 16
    catalog.adapters["broken"] = adapter_version("broken", broken)
    catalog.add_route("a", steering=(AdapterWeight(name="broken", version=broken, alpha=1.0),))
    catalog.add_route("z", steering=(AdapterWeight(name="plain", version=PLAIN, alpha=1.0),))
    residency = Residency(fake, catalog, clock=clock)
    fake.refuse_version = lambda version: WeightsError("NaN") if version == broken else None
    with pytest.raises(WeightsError):
        await residency.converge()
    assert residency.committed == {KIND, PLAIN}
    with pytest.raises(EngineUnavailableError, match=f"broken@{broken}"):
        await residency.check_ready()


async def test_keep_converged_outlives_an_engine_that_is_down(residency: Residency, fake: FakeEngine) -> None:
    fake.is_up = False
    task = asyncio.create_task(residency.keep_converged(interval_s=0))
    for _ in range(10):
        await asyncio.sleep(0)
    fake.is_up = True
    async with asyncio.timeout(5):
        while KIND not in fake.versions:
            await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await residency.aclose()


async def test_20_swaps_under_32_users_fail_nobody(residency: Residency, fake: FakeEngine) -> None:
    failures: list[TrimtabError] = []
    is_over = False

    async def user() -> None:
        while not is_over:
            try:
                async with residency.pin([KIND]):
                    await asyncio.sleep(0)
                    assert fake.versions[KIND].state == "committed"
            except TrimtabError as exc:
                failures.append(exc)

    users = [asyncio.create_task(user()) for _ in range(32)]
    for _ in range(20):
        await residency.retire(KIND)
        for _ in range(50):
            await asyncio.sleep(0)
    is_over = True
    await asyncio.gather(*users)
    assert failures == []
