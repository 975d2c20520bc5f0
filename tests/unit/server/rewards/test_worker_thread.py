"""The thread of a reward that is plain code."""

import asyncio
import gc
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from trimtab_server.rewards.worker_thread import WorkerThread

pytestmark = pytest.mark.anyio


def names() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


async def test_all_calls_run_in_one_thread_that_is_not_the_event_loops() -> None:
    worker = WorkerThread("w")
    idents = {await worker.run(threading.get_ident) for _ in range(5)}
    assert len(idents) == 1
    assert threading.get_ident() not in idents


async def test_callers_who_leave_do_not_pile_up_behind_a_call_that_hangs() -> None:
    worker, gate, order = WorkerThread("w"), threading.Event(), list[str]()

    def first() -> None:
        assert gate.wait(30)
        order.append("first")

    calls = [asyncio.create_task(worker.run(first))]
    calls += [asyncio.create_task(worker.run(lambda: order.append("waited in vain"))) for _ in range(3)]
    for call in calls:
        await asyncio.sleep(0.01)
        call.cancel()
    last = asyncio.create_task(worker.run(lambda: order.append("last")))
    await asyncio.sleep(0.01)
    assert order == []
    gate.set()
    await last
    assert order == ["first", "last"]


async def test_the_thread_ends_with_its_owner() -> None:
    worker = WorkerThread("thread-that-ends")
    await worker.run(lambda: None)
    assert "thread-that-ends" in names()
    del worker
    gc.collect()
    deadline = time.monotonic() + 10
    while "thread-that-ends" in names() and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    assert "thread-that-ends" not in names()


def test_a_reward_that_hangs_does_not_keep_the_process_from_ending() -> None:
    code = """
        import asyncio, threading
        from trimtab_adapters.contract.errors import RewardError
        from trimtab_adapters.contract.rewards import RewardInput
        from trimtab_server.rewards.batching import BatchedReward
        from trimtab_server.rewards.limits import RewardLimits

        class Hangs:
            name, version = "hangs", "1"

            def score(self, inputs):
                threading.Event().wait()

        async def main():
            try:
                await BatchedReward(Hangs(), RewardLimits(timeout_s=0.05)).score([RewardInput("p", "o")])
            except RewardError as error:
                print(error)

        asyncio.run(main())
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "the reward 'hangs' did not answer within 0.05 s\n"
