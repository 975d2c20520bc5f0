import asyncio

import pytest

from trimtab_adapters.contract.errors import EngineError
from trimtab_server.decoding.shared_lookup import SharedLookup
from trimtab_server.decoding.token_texts import MAX_CONCURRENT, TokenTexts
from trimtab_server.engine.fake import FakeEngine

pytestmark = pytest.mark.anyio


async def test_concurrent_callers_share_a_question_and_later_ones_the_answer() -> None:
    asked: list[str] = []
    gate = asyncio.Event()

    async def ask(key: str) -> str:
        asked.append(key)
        await gate.wait()
        return key.upper()

    lookup = SharedLookup(ask, max_weight=10)
    calls = [asyncio.create_task(lookup.get(key)) for key in ("a", "a", "b")]
    await asyncio.sleep(0)
    calls[0].cancel()  # the one that began the question
    await asyncio.sleep(0)
    gate.set()
    assert await calls[1] == "A"
    assert await calls[2] == "B"
    assert await lookup.get("a") == "A"
    assert asked == ["a", "b"]


async def test_a_failure_reaches_all_and_is_not_kept() -> None:
    outcomes = [EngineError("down"), None]

    async def ask(key: str) -> str:
        await asyncio.sleep(0)
        if (error := outcomes.pop(0)) is not None:
            raise error
        return key

    lookup = SharedLookup(ask, max_weight=10)
    results = await asyncio.gather(lookup.get("a"), lookup.get("a"), return_exceptions=True)
    assert [type(result) for result in results] == [EngineError, EngineError]
    assert await lookup.get("a") == "a"


async def test_the_least_recently_used_answers_go_when_they_weigh_too_much() -> None:
    asked: list[int] = []

    async def ask(key: int) -> tuple[int, ...]:
        asked.append(key)
        return (0,) * key

    lookup = SharedLookup(ask, max_weight=10, weigh=len)
    for key in (4, 5, 4, 3, 4, 5, 11, 11):
        await lookup.get(key)
    # 3 drives 5 out, which was used before 4; 5 drives 3 out; 11 is too large to be kept and drives all out
    assert asked == [4, 5, 3, 5, 11, 11]


async def test_each_token_is_asked_for_once_and_not_too_many_at_a_time() -> None:
    engine = FakeEngine()
    running = most = 0
    post = engine.post

    async def counted(path: str, body: dict[str, list[int]]) -> dict[str, str]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return await post(path, body)

    engine.post = counted  # type: ignore[method-assign]
    texts = TokenTexts(engine)
    found = await texts.of([*range(64, 128), 65, 65])
    assert found[65] == "A"
    assert (await texts.of([65, 66]))[66] == "B"
    assert len(engine.observed.posted) == 64
    assert most == MAX_CONCURRENT
