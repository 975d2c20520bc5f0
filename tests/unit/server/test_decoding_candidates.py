import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest
from typing_extensions import override

from trimtab_adapters.contract.errors import EngineDiedError, EngineRequestError, SteeringError
from trimtab_adapters.contract.params import AdapterWeight, SteeringParams
from trimtab_adapters.contract.records import SteeringRecord
from trimtab_server.decoding.candidates import Selection
from trimtab_server.decoding.fanout import MAX_GROUP, MergedStream, generate_all, groups
from trimtab_server.decoding.job import PromptResult
from trimtab_server.decoding.logprobs import checked_record, steering_logprobs
from trimtab_server.decoding.usage import total_usage
from trimtab_server.engine.base import Candidate, EngineDelta, EngineRequest
from trimtab_server.engine.fake import FakeEngine, Fault

pytestmark = pytest.mark.anyio


def requests(num: int) -> list[EngineRequest]:
    body = {"prompt": "Hi", "max_tokens": 3, "logprobs": 0}
    return [EngineRequest("completions", body, None, f"r-{i}") for i in range(num)]


def candidate(token_ids: list[int], *, prompt_tokens: int = 2) -> Candidate:
    weights = [AdapterWeight(name="kind", version="a" * 16, alpha=1.0)]
    return Candidate(
        index=0,
        choice={},
        text="",
        prompt_token_ids=[1] * prompt_tokens,
        token_ids=token_ids,
        token_logprobs=[-1.0] * len(token_ids),
        finish_reason="stop",
        usage={"prompt_tokens": prompt_tokens, "completion_tokens": len(token_ids)},
        duration_s=0.0,
        steering=SteeringParams(uid="u", adapters=weights, record=True),
    )


def record(token_ids: list[int], **fields: object) -> SteeringRecord:
    n = len(token_ids)
    values = [-float(i) for i in range(n)]
    return SteeringRecord(
        uid="u",
        num_tokens=n,
        token_ids=token_ids,
        base_logprobs=values,
        adapter_logprobs=[values],
        steered_logprobs=values,
        kl=[0.1] * n,
        flipped=[False] * n,
    ).model_copy(update=fields)


async def test_candidates_come_in_the_order_of_their_requests() -> None:
    fake = FakeEngine()
    together = await generate_all(fake, requests(5))
    singly = [await fake.generate(request) for request in requests(5)]
    assert [c.text for c in together] == [c.text for c in singly]
    assert len({c.text for c in together}) > 1


async def test_the_first_error_stops_the_rest_and_is_raised_plain() -> None:
    fake = FakeEngine(fault_for=lambda r: Fault(EngineDiedError("gone")) if r.request_id == "r-1" else None)
    fake.hold_after(1)
    with pytest.raises(EngineDiedError, match="gone"):
        await generate_all(fake, requests(3))
    assert fake.observed.running == 0


async def test_candidates_that_differ_by_their_seeds_alone_share_a_request() -> None:
    def made(number: int, **body: Any) -> EngineRequest:
        return EngineRequest("completions", {"prompt": "Hi", **body}, None, f"r-{number}")

    steering = SteeringParams(uid="u", adapters=[AdapterWeight(name="a", version="a" * 16, alpha=1.0)])
    seeded = [made(i, seed=5 + i) for i in range(3)]
    unseeded = [made(i) for i in range(3, 5)]
    other = made(5, temperature=0.5)
    beams = [made(i, use_beam_search=True) for i in (6, 7)]
    steered = [EngineRequest("completions", {"prompt": "Hi"}, steering, f"r-{i}") for i in (8, 9)]
    gap = [made(10, seed=1), made(11, seed=3)]
    greedy = [made(i, temperature=0) for i in (12, 13)]  # vLLM refuses more than one greedy choice of a request
    asked = [*seeded, *unseeded, other, *beams, *steered, *gap, *greedy]
    sizes = [len(members) for members in groups(asked)]
    assert sizes == [3, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    assert [request for members in groups(asked) for request in members] == asked
    assert [len(members) for members in groups([made(i) for i in range(2 * MAX_GROUP + 1)])] == [
        MAX_GROUP,
        MAX_GROUP,
        1,
    ]


class NoGroups(FakeEngine):
    """Refuses groups, as vLLM does where the model's own default is greedy."""

    @override
    async def generate_group(self, requests: Sequence[EngineRequest]) -> list[Candidate]:
        raise EngineRequestError("n must be 1 when using greedy sampling", engine_status=400)


async def test_where_the_engine_minds_a_group_its_members_are_asked_for_alone() -> None:
    found = await generate_all(NoGroups(), requests(3))
    assert [candidate.text for candidate in found] == [(await FakeEngine().generate(r)).text for r in requests(3)]
    with pytest.raises(EngineDiedError, match="gone"):
        await generate_all(NoGroups(fault_for=lambda r: Fault(EngineDiedError("gone"))), requests(3))


async def test_a_merged_stream_gives_all_deltas_of_all_requests_in_their_order() -> None:
    fake = FakeEngine()
    stream, seen = MergedStream(fake.raw_stream, requests(3)), dict[int, list[int]]()
    while (item := await stream.next()) is not None:
        seen.setdefault(item[0], []).extend(item[1].token_ids)
    assert seen == {i: (await fake.generate(r)).token_ids for i, r in enumerate(requests(3))}


async def test_a_slow_reader_holds_the_engine_back() -> None:
    produced = 0

    class Endless(FakeEngine):
        @override
        async def stream(self, request: EngineRequest) -> AsyncGenerator[EngineDelta, None]:
            nonlocal produced
            while True:
                produced += 1
                yield EngineDelta(choice={"text": "x"})

    stream = MergedStream(Endless().stream, requests(1))
    await stream.next()
    for _ in range(100):
        await asyncio.sleep(0)
    assert produced <= 5
    await stream.aclose()


def test_a_record_is_cut_to_the_tokens_of_the_answer() -> None:
    # a stop string was seen one token late
    cut = checked_record(candidate([5, 6]), record([5, 6, 7]))
    assert (cut.num_tokens, cut.token_ids, cut.base_logprobs, cut.adapter_logprobs) == (
        2,
        [5, 6],
        [0.0, -1.0],
        [[0.0, -1.0]],
    )


@pytest.mark.parametrize(
    ("taken", "message"),
    [
        (None, "no record"),
        (record([5, 6], status="failed", error="NaN"), "NaN"),
        (record([5]), "not that of"),
        (record([5, 7]), "not that of"),
        (record([5, 6], num_tokens=1), "not that of"),
    ],
)
def test_a_record_that_does_not_prove_the_steering_is_refused(taken: SteeringRecord | None, message: str) -> None:
    with pytest.raises(SteeringError, match=message):
        checked_record(candidate([5, 6]), taken)


def test_steering_logprobs_are_those_of_the_record() -> None:
    steered = candidate([5, 6])
    steered.record = record([5, 6])
    assert steering_logprobs(steered) == {
        "token_ids": [5, 6],
        "base": [0.0, -1.0],
        "adapter": [[0.0, -1.0]],
        "steered": [0.0, -1.0],
        "kl": [0.1, 0.1],
        "flipped": [False, False],
    }


def test_usage_counts_prompts_once_and_every_candidate() -> None:
    def result(lengths: list[int], references: list[int], prompt_tokens: int) -> PromptResult:
        found = [candidate([1] * n, prompt_tokens=prompt_tokens) for n in lengths]
        selections = [Selection(c, None, i, len(found)) for i, c in enumerate(found)]
        return PromptResult(selections, [candidate([1] * n) for n in references])

    usage = total_usage([result([3, 4], [], 2), result([1, 0], [], 5)])
    assert usage == {"prompt_tokens": 7, "completion_tokens": 8, "total_tokens": 15}
    assert total_usage([result([3], [2, 2], 2)])["reference_tokens"] == 4
