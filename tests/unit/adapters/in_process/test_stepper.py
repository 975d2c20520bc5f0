"""The steering thread: its rows are batched, closed whatever happens, and fail alone."""

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from steering_reference import Reference, base_description, params
from tiny_models import TinyModels
from trimtab_adapters.contract.errors import EngineError, EngineRequestError, SteeringError
from trimtab_adapters.contract.sampling import SamplingRules, TopLogprobs
from trimtab_adapters.in_process import stepper as stepper_module
from trimtab_adapters.in_process.stepper import Stepper

pytestmark = pytest.mark.anyio

GREEDY = SamplingRules(temperature=0.0)
TOP = TopLogprobs((7, 9, 11), (-0.7, -1.2, -2.0))
PROMPT = [3, 4, 5]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def stepper(tiny_models: TinyModels) -> Iterator[Stepper]:
    made = Stepper(base_description(tiny_models.base), unseen="exclude", kv_bytes=16 << 20)
    version = tiny_models.manifest("adapter").version_id

    async def load() -> None:
        await made.prepare(version, str(tiny_models.adapter))
        await made.commit(version)

    asyncio.run(load())
    yield made
    made.aclose()


@pytest.fixture
def steering(tiny_models: TinyModels) -> Any:
    return lambda uid="u": params(uid, (tiny_models.manifest("adapter").version_id, 1.0))


async def num_rows(stepper: Stepper) -> int:
    return sum(version.active_rows for version in (await stepper.status()).versions)


async def test_a_token_is_that_of_the_formula(stepper: Stepper, steering: Any, tiny_models: TinyModels) -> None:
    reference = Reference()
    reference.add("adapter", tiny_models.adapter)
    session = await stepper.open(steering(), PROMPT, SamplingRules(temperature=0.0, num_top=5))
    token = await stepper.step(session, TOP)
    stepper.close(session)
    row = torch.full((128,), -torch.inf)
    row[[7, 9, 11]] = torch.tensor(TOP.logprobs)
    steered = torch.log_softmax(row + reference.logprobs("adapter", PROMPT), dim=-1)
    assert token.token_id == int(steered.argmax())
    assert token.logprob == pytest.approx(float(steered.max()), abs=1e-4)
    order = steered.argsort(descending=True)[:3].tolist()
    assert [token_id for token_id, _ in token.top] == order  # three tokens exist, though five were asked for


async def test_without_steering_the_base_is_left_as_it_is(stepper: Stepper) -> None:
    """And nothing is kept of it."""
    session = await stepper.open(None, PROMPT, GREEDY)
    token = await stepper.step(session, TOP)
    stepper.close(session)
    assert token.token_id == 7
    assert token.logprob == pytest.approx(float(torch.tensor(TOP.logprobs).log_softmax(-1)[0]))
    assert await stepper.take_records([session.row.params.uid]) == {}


async def test_those_that_wait_step_together(stepper: Stepper, steering: Any) -> None:
    sessions = [await stepper.open(steering(f"u{i}"), [3 + i, 4], GREEDY) for i in range(5)]
    entered, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        go_on.wait(10)

    holding = asyncio.create_task(stepper._run(hold))
    await asyncio.to_thread(entered.wait, 10)
    before = stepper._worker.core.num_steps
    steps = [asyncio.create_task(stepper.step(session, TOP)) for session in sessions]
    await asyncio.sleep(0)
    go_on.set()
    await asyncio.gather(holding, *steps)
    assert stepper._worker.core.num_steps == before + 1
    for session in sessions:
        stepper.close(session)
    assert await num_rows(stepper) == 0


async def test_penalties_count_what_was_sampled_and_not_the_prompt(stepper: Stepper) -> None:
    rules = SamplingRules(temperature=0.0, presence_penalty=1.0)
    session = await stepper.open(None, [7, 7, 7], rules)
    tokens = [(await stepper.step(session, TOP)).token_id for _ in range(3)]
    stepper.close(session)
    assert tokens == [7, 9, 7]  # -0.7 - 1 < -1.2; then -1.7 > -2.0 and > -2.2


async def test_the_same_seed_draws_the_same_tokens(stepper: Stepper) -> None:
    async def draw(seed: int | None) -> list[int]:
        session = await stepper.open(None, PROMPT, SamplingRules(seed=seed, temperature=2.0))
        tokens = [(await stepper.step(session, TOP)).token_id for _ in range(40)]
        stepper.close(session)
        return tokens

    assert await draw(-3) == await draw(-3)
    assert await draw(1) != await draw(2)
    assert await draw(None) != await draw(None)  # the same by chance in far less than one of 10**12 runs


async def test_one_bad_row_leaves_the_others_alone(stepper: Stepper, steering: Any) -> None:
    good = await stepper.open(steering("good"), PROMPT, GREEDY)
    empty = await stepper.open(steering("empty"), PROMPT, SamplingRules(logit_bias={7: -1e30, 9: -1e30, 11: -1e30}))
    odd = await stepper.open(steering("odd"), PROMPT, GREEDY)
    odd.row.error = "made to fail"
    outside = await stepper.open(steering("outside"), PROMPT, GREEDY)
    outcomes = await asyncio.gather(
        stepper.step(good, TOP),
        stepper.step(empty, TopLogprobs((7,), (-float("inf"),))),
        stepper.step(odd, TOP),
        stepper.step(outside, TopLogprobs((128,), (-0.1,))),
        return_exceptions=True,
    )
    for session in (good, empty, odd, outside):
        stepper.close(session)
    assert not isinstance(outcomes[0], BaseException)
    assert isinstance(outcomes[1], EngineRequestError)
    assert isinstance(outcomes[2], SteeringError)
    assert "made to fail" in str(outcomes[2])
    assert isinstance(outcomes[3], EngineError)
    assert await num_rows(stepper) == 0


async def test_a_fault_inside_a_step_reaches_the_caller_and_the_thread_lives(
    stepper: Stepper, steering: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: Any) -> int:
        raise RuntimeError("boom")

    session = await stepper.open(steering("x"), PROMPT, GREEDY)
    with monkeypatch.context() as patch:
        patch.setattr(stepper_module, "sample", explode)
        with pytest.raises(SteeringError, match="internal error"):
            await stepper.step(session, TOP)
    with pytest.raises(SteeringError):
        await stepper.step(session, TOP)  # it has lost a token; it must not go on
    stepper.close(session)
    other = await stepper.open(steering("y"), PROMPT, GREEDY)
    await stepper.step(other, TOP)
    stepper.close(other)


async def test_a_caller_that_leaves_while_it_opens_leaves_no_row(stepper: Stepper, steering: Any) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        go_on.wait(10)

    for leaves_early in (True, False):
        entered.clear()
        go_on.clear()
        holding = asyncio.create_task(stepper._run(hold))
        await asyncio.to_thread(entered.wait, 10)
        opening = asyncio.create_task(stepper.open(steering("z"), PROMPT, GREEDY))
        await asyncio.sleep(0)
        if leaves_early:
            opening.cancel()
            go_on.set()
        else:
            go_on.set()
            time.sleep(0.2)  # it is opened, and the loop has not seen it yet
            opening.cancel()
        await asyncio.gather(holding, opening, return_exceptions=True)
        async with asyncio.timeout(10):  # on a busy machine it may still be opening, and is closed right after that
            while await num_rows(stepper):
                await asyncio.sleep(0.005)


async def test_what_cannot_be_steered_is_refused_when_it_opens(stepper: Stepper) -> None:
    with pytest.raises(SteeringError, match="not loaded"):
        await stepper.open(params("u", ("f" * 16, 1.0)), PROMPT, GREEDY)


async def test_records_are_read_and_taken_once(stepper: Stepper, steering: Any) -> None:
    session = await stepper.open(steering("r"), PROMPT, GREEDY)
    tokens = [(await stepper.step(session, TOP)).token_id for _ in range(3)]
    stepper.close(session)
    assert (await stepper.read_records({"r": 1}))["r"].token_ids == tokens[1:]
    assert (await stepper.take_records(["r", "nobody"]))["r"].token_ids == tokens
    assert await stepper.take_records(["r"]) == {}


async def test_the_thread_ends_with_the_stepper(tiny_models: TinyModels) -> None:
    def alive() -> int:
        return sum(thread.name == "steering" for thread in threading.enumerate())

    before = alive()
    made = Stepper(base_description(tiny_models.base), unseen="exclude", kv_bytes=1 << 20)
    assert alive() == before + 1
    del made
    deadline = time.monotonic() + 5
    while alive() > before and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    assert alive() == before
