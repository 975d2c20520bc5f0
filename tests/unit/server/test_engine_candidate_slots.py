"""How many candidates are in an engine at the same time."""

import asyncio

import pytest

from trimtab_server.engine.candidate_slots import CandidateSlots

pytestmark = pytest.mark.anyio


async def test_groups_and_single_candidates_share_the_slots_and_none_waits_for_ever() -> None:
    slots, inside, most, done = CandidateSlots(8), 0, 0, 0

    async def work(num: int) -> None:
        nonlocal inside, most, done
        async with slots.taken(num):
            inside += num
            most = max(most, inside)
            await asyncio.sleep(0)
            inside -= num
            done += 1

    async with asyncio.timeout(10):
        await asyncio.gather(*(work(1 + i % 7) for i in range(200)))
    assert (done, inside) == (200, 0)
    assert 7 <= most <= 8


async def test_a_group_larger_than_the_bound_has_them_all_to_itself() -> None:
    slots = CandidateSlots(2)
    async with slots.taken(5):
        other = asyncio.create_task(_enter(slots))
        await asyncio.sleep(0.01)
        assert not other.done()
    async with asyncio.timeout(5):
        await other


async def test_who_gives_up_while_waiting_gives_back_what_it_had() -> None:
    slots = CandidateSlots(2)
    async with slots.taken(1):
        waiting = asyncio.create_task(_enter(slots, 2))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    async with asyncio.timeout(5), slots.taken(2):
        pass


async def _enter(slots: CandidateSlots, num: int = 1) -> None:
    async with slots.taken(num):
        pass
