"""The field `selection`: what is refused, what streams, what may fail, what is returned and logged."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fake_gateway import FakeGateway, asgi_client, build_gateway
from selecting import all_candidates, answer, chosen_text, post, states
from trimtab_adapters.contract.errors import EngineRequestError, RewardError
from trimtab_server.engine.base import EngineRequest
from trimtab_server.engine.fake import FakeEngine, Fault
from trimtab_server.sse import KEEP_ALIVE

pytestmark = pytest.mark.anyio


def length(prompt: str, output: str) -> float:
    return float(len(output))


@pytest.fixture
def gateway(gateway: FakeGateway) -> FakeGateway:
    gateway.scoring.rewards["length"] = length
    gateway.scoring.fixed = [float(i) for i in range(100)]
    return gateway


@pytest.fixture
def impatient(anyio_backend: str) -> FakeGateway:
    """A gateway that gives a sign of life after 20 milliseconds of silence."""
    gateway = build_gateway(keep_alive_s=0.02)
    gateway.scoring.rewards["length"] = length
    return gateway


def released_after_signs_of_life(gateway: FakeGateway, num_signs: int) -> ASGIApp:
    """The gateway's application; its engine goes on once so many signs of life were sent, however long that takes."""
    num_sent = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def watched(message: Message) -> None:
            nonlocal num_sent
            await send(message)
            num_sent += message.get("body", b"").count(KEEP_ALIVE)
            if num_sent >= num_signs:
                gateway.engine.release()

        await gateway.app(scope, receive, watched)

    return app


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"selection": "adaptive"}, "selection"),
        ({"selection": {"strategy": "best"}}, "selection.strategy"),
        ({"selection": {"strategy": "adaptive"}}, "selection"),
        ({"selection": {"strategy": "adaptive", "threshold": 0.5, "price": 0.1}}, "selection"),
        ({"selection": {"strategy": "adaptive", "threshold": 1.5}}, "selection.threshold"),
        ({"selection": {"strategy": "adaptive", "threshold": "0.5"}}, "selection.threshold"),
        ({"selection": {"strategy": "adaptive", "target": 0.99}, "best_of": 4}, "selection.target"),
        ({"selection": {"strategy": "adaptive", "threshold": 0.5, "waves": 2}}, "selection.waves"),
        ({"selection": {"strategy": "early_reject", "checkpoints": [8, 4]}, "best_of": 4}, "selection"),
        ({"selection": {"strategy": "early_reject", "checkpoints": [16]}, "best_of": 4}, "selection.checkpoints"),
        ({"selection": {"strategy": "early_reject", "keep": 1.0}, "best_of": 4}, "selection.keep"),
        ({"selection": {"strategy": "soft"}, "best_of": 4}, "selection.beta"),
        ({"selection": {"strategy": "soft", "beta": 0.0}, "best_of": 4}, "selection.beta"),
        ({"selection": {"strategy": "soft", "beta": 1.0, "transform": {"kind": "exponential"}}}, "selection.transform"),
        ({"selection": {"strategy": "blockwise"}, "best_of": 2, "max_tokens": 5000}, "max_tokens"),
        ({"selection": {"strategy": "early_reject"}, "best_of": 2, "max_tokens": 5000}, "max_tokens"),
        ({"selection": {"strategy": "soft", "beta": 1.0}, "best_of": 4, "calibration": {"size": 0}}, "calibration"),
        ({"selection": {"strategy": "adaptive", "threshold": 0.5}, "reward": None}, "reward"),
        ({"selection": {"strategy": "adaptive", "threshold": 0.5}, "stream": True}, "stream"),
        ({"selection": {"strategy": "best_of_n", "stream": "buffered"}, "best_of": 3}, "selection.stream"),
        ({"selection": {"strategy": "adaptive", "threshold": 0.5}, "best_of": 2, "n": 3}, "best_of"),
        ({"selection": {"strategy": "soft", "beta": 1.0}}, "best_of"),
        ({"selection": {"strategy": "early_reject"}, "best_of": 2, "n": 2}, "best_of"),
    ],
)
async def test_what_does_not_fit_is_a_400_that_names_the_field(
    client: httpx.AsyncClient, gateway: FakeGateway, body: dict[str, Any], param: str
) -> None:
    response = await post(client, **{"reward": "length", **body})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    assert gateway.engine.observed.requests == []


async def test_all_candidates_come_back_with_their_rewards(client: httpx.AsyncClient) -> None:
    known = await all_candidates(client, 5, seed=3, max_tokens=6)
    data = await answer(
        client, best_of=5, n=2, seed=3, max_tokens=6, reward="length", selection={"return_candidates": True}
    )
    by_index = {candidate["index"]: candidate for candidate in data["candidates"]}
    assert {i: c["text"] for i, c in by_index.items()} == {c.index: c.text for c in known}
    assert {i: c["reward"]["raw"] for i, c in by_index.items()} == {c.index: float(len(c.text)) for c in known}
    assert sorted(states(data).values()) == ["chosen"] * 2 + ["not_chosen"] * 3
    assert [c["rank"] for c in data["candidates"]] == [0, 1, 2, 3, 4]
    assert "candidates" not in await answer(client, best_of=5, reward="length")


def events_of(text: str) -> list[Any]:
    parts = [part for part in text.strip().split("\n\n") if not part.startswith(":")]
    assert parts[-1] == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-1]]


@pytest.mark.parametrize("logprobs", [None, 1])
async def test_a_buffered_stream_sends_the_choices_in_chunks(client: httpx.AsyncClient, logprobs: int | None) -> None:
    body: dict[str, Any] = {"best_of": 5, "n": 2, "seed": 3, "max_tokens": 20, "reward": "length", "logprobs": logprobs}
    whole = await answer(client, **body)
    response = await post(
        client, stream=True, stream_options={"include_usage": True}, selection={"stream": "buffered"}, **body
    )
    *chunks, usage = events_of(response.text)
    for index, choice in enumerate(whole["choices"]):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(piece["text"] for piece in mine) == choice["text"]
        assert len(mine) > 2
        assert [piece["finish_reason"] for piece in mine] == [*[None] * (len(mine) - 1), choice["finish_reason"]]
        assert mine[-1]["selection"] == choice["selection"]
        if logprobs is not None:
            told = [value for piece in mine if piece["logprobs"] for value in piece["logprobs"]["token_logprobs"]]
            assert told == choice["logprobs"]["token_logprobs"]
        else:
            assert {piece["logprobs"] for piece in mine} == {None}
    assert usage["usage"] == whole["usage"]


async def test_a_buffered_chat_has_the_role_first(client: httpx.AsyncClient) -> None:
    body = {
        "model": "base",
        "messages": [{"role": "user", "content": "Hi"}],
        "best_of": 3,
        "reward": "length",
        "max_tokens": 20,
        "seed": 1,
    }
    whole = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]
    response = await client.post(
        "/v1/chat/completions", json={**body, "stream": True, "selection": {"stream": "buffered"}}
    )
    deltas = [chunk["choices"][0]["delta"] for chunk in events_of(response.text)]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content") or "" for delta in deltas) == whole["message"]["content"]


async def test_a_waiting_stream_shows_that_it_lives(impatient: FakeGateway) -> None:
    impatient.engine.hold_after(2)
    async with asgi_client(released_after_signs_of_life(impatient, 3)) as client:
        body = {"best_of": 3, "reward": "length", "max_tokens": 4, "selection": {"stream": "buffered"}}
        response = await post(client, stream=True, **body)
    assert response.text.count(": keep-alive\n\n") >= 3
    assert len(events_of(response.text)) >= 2


async def test_an_error_before_the_first_sign_of_life_keeps_its_status_and_a_later_one_is_an_event(
    client: httpx.AsyncClient, gateway: FakeGateway, impatient: FakeGateway
) -> None:
    def fail(prompt: str, output: str) -> float:
        raise RewardError("the reward model is down")

    gateway.scoring.rewards["down"] = fail
    body: dict[str, Any] = {"best_of": 3, "reward": "down", "max_tokens": 4, "selection": {"stream": "buffered"}}
    assert (await post(client, stream=True, **body)).status_code == 502
    impatient.scoring.rewards["down"] = fail
    impatient.engine.hold_after(2)
    async with asgi_client(released_after_signs_of_life(impatient, 1)) as impatient_client:
        late = await post(impatient_client, stream=True, **body)
    assert late.status_code == 200
    last = late.text.strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "reward_failed"


async def test_a_client_that_leaves_a_buffered_stream_stops_the_engine(gateway: FakeGateway) -> None:
    gateway.engine.hold_after(2)
    async with asgi_client(gateway.app) as client:
        body = {"stream": True, "best_of": 3, "reward": "length", "selection": {"stream": "buffered"}}
        task = asyncio.create_task(post(client, **body))
        await gateway.engine.reached_gate.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    async with asyncio.timeout(5):
        while gateway.engine.observed.running:
            await asyncio.sleep(0.005)
    assert len(gateway.engine.observed.aborted) == 3


def faulty(*indices: int) -> FakeEngine:
    def fault_for(request: EngineRequest) -> Fault | None:
        if int(request.request_id.rpartition("-")[2]) in indices and "-ref-" not in request.request_id:
            return Fault(error=EngineRequestError("broken", engine_status=500))
        return None

    return FakeEngine(fault_for=fault_for)


STRATEGIES: list[dict[str, Any]] = [
    {},
    {"strategy": "adaptive", "threshold": 0.99, "wave": 2},
    {"strategy": "early_reject", "checkpoints": [1, 3]},
    {"strategy": "soft", "beta": 0.5},
    {"strategy": "rejection", "beta": 0.0001},
    {"strategy": "poisson", "mean": 60.0},
]


@pytest.mark.parametrize("selection", STRATEGIES)
async def test_a_candidate_that_fails_is_an_error_or_is_left_out_and_named(
    anyio_backend: str, selection: dict[str, Any]
) -> None:
    gateway = build_gateway(fake=faulty(1, 2))
    gateway.scoring.rewards["length"] = length
    gateway.scoring.fixed = [0.0, 1000.0]
    async with asgi_client(gateway.app) as client:
        body: dict[str, Any] = {"best_of": 4, "reward": "length", "max_tokens": 6, "seed": 1}
        response = await post(client, selection=selection, **body)
        assert response.status_code == 502
        data = await answer(
            client, selection={**selection, "on_failure": "leave_out", "return_candidates": True}, **body
        )
        told = data["choices"][0]["selection"]
        assert [item["index"] for item in told["left_out"]] == [1, 2]
        assert told["left_out"][0]["error"]["message"] == "The engine failed while answering this request."
        assert sorted(states(data)) == [0, 3]
        gateway.engine.fault_for = faulty(*range(64)).fault_for
        nothing = await post(client, selection={**selection, "on_failure": "leave_out"}, **body)
        assert nothing.status_code == 502
        assert nothing.json()["error"]["code"] == "engine_error"


@pytest.mark.parametrize("selection", STRATEGIES)
async def test_a_candidate_that_cannot_be_scored_is_an_error_or_is_left_out_and_never_0(
    client: httpx.AsyncClient, gateway: FakeGateway, selection: dict[str, Any]
) -> None:
    # By its first word, which a candidate has at the first checkpoint and at its end alike.
    known = await all_candidates(client, 4, max_tokens=6, seed=1)
    first_words = [candidate.tokens[0] for candidate in known]
    assert first_words.count(first_words[2]) == 1

    def picky(prompt: str, output: str) -> float:
        if output.startswith(first_words[2]):
            raise RewardError("cannot score this")
        return -1.0 - len(output)

    gateway.scoring.rewards["picky"] = picky
    gateway.scoring.fixed = [-1000.0, 0.0]
    body: dict[str, Any] = {"best_of": 4, "reward": "picky", "max_tokens": 6, "seed": 1}
    response = await post(client, **body, selection={**selection, "on_failure": "leave_out", "return_candidates": True})
    assert response.status_code == 200, response.text
    told = response.json()["choices"][0]["selection"]
    (left_out,) = told["left_out"]
    assert (left_out["index"], left_out["error"]["code"]) == (2, "reward_failed")
    assert left_out["error"]["message"] == "cannot score this"
    assert 2 not in states(response.json())
    strict = await post(client, selection=selection, **body)
    assert strict.status_code == 502
    assert strict.json()["error"]["code"] == "reward_failed"


async def test_rollouts_of_stopped_candidates_say_so(client: httpx.AsyncClient, gateway: FakeGateway) -> None:
    data = await answer(
        client,
        model="kind",
        best_of=6,
        reward="length",
        seed=1,
        max_tokens=10,
        selection={"strategy": "early_reject", "checkpoints": [3], "return_candidates": True},
    )
    logged = {rollout.candidate_index: rollout for rollout in gateway.log.rollouts}
    assert len(logged) == 6
    for index, state in states(data).items():
        rollout = logged[index]
        assert (rollout.finish_reason == "abort") == (state == "stopped")
        assert rollout.metadata["selection"] == "early_reject"
        assert rollout.chosen == (state == "chosen")
        assert rollout.base_logprobs is not None
        assert rollout.steered_logprobs is not None
        assert len(rollout.base_logprobs) == len(rollout.steered_logprobs) == len(rollout.output_token_ids)


async def test_mean_log_probability_still_ranks_without_a_reward(client: httpx.AsyncClient) -> None:
    plain = await answer(client, best_of=6, seed=2)
    named = await answer(client, best_of=6, seed=2, selection={"strategy": "best_of_n"})
    assert chosen_text(plain) == chosen_text(named)
    assert named["choices"][0]["selection"]["strategy"] == "best_of_n"


async def test_reference_rollouts_are_drawn_while_candidates_are_generated(
    client: httpx.AsyncClient, gateway: FakeGateway
) -> None:
    gateway.scoring.fixed = None
    gateway.engine.hold_after(1)
    body = {"best_of": 3, "reward": "length", "max_tokens": 4, "calibration": {"size": 4}}
    task = asyncio.create_task(post(client, **body))
    async with asyncio.timeout(5):
        while gateway.engine.observed.running < 7:
            await asyncio.sleep(0.005)
    gateway.engine.release()
    assert (await task).json()["choices"][0]["selection"]["reward"]["calibration_size"] == 4


async def test_an_unknown_reward_is_told_before_anything_is_generated(
    client: httpx.AsyncClient, gateway: FakeGateway
) -> None:
    for body in (
        {"reward": "nope"},
        {"reward": "length", "selection": {"strategy": "early_reject", "checkpoints": [2], "prefix_reward": "nope"}},
    ):
        assert (await post(client, best_of=3, **body)).status_code == 404
    assert gateway.engine.observed.requests == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"reward": {"length": 0.5, "other": 0.5}, "calibration": {"method": "none"}}, "calibration"),
        ({"selection": {"strategy": "adaptive", "threshold": 0.5}, "calibration": {"method": "leave_one_out"}}, None),
        ({"model": "kind", "calibration": {"method": "leave_one_out"}}, None),
        ({"reward": {"length": -1.0}}, "reward.length"),
    ],
)
async def test_calibrations_that_do_not_fit_are_refused(
    client: httpx.AsyncClient, gateway: FakeGateway, body: dict[str, Any], param: str | None
) -> None:
    response = await post(client, **{"best_of": 4, "reward": "length", **body})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == (param or "calibration.method")
    assert gateway.engine.observed.requests == []


async def test_a_warning_stands_beside_the_choice(anyio_backend: str) -> None:
    asked: list[tuple[str, str, int]] = []

    class Caps:
        async def warning(self, reward_name_at_version: str, base_model: str, num_candidates: int) -> str | None:
            asked.append((reward_name_at_version, base_model, num_candidates))
            return "too many" if num_candidates > 4 else None

    gateway = build_gateway(parts={"caps": Caps()})
    gateway.scoring.rewards["length"] = length
    async with asgi_client(gateway.app) as client:
        many = await answer(client, best_of=6, reward="length")
        few = await answer(client, best_of=3, reward="length")
    assert many["choices"][0]["selection"]["warnings"] == ["too many"]
    assert "warnings" not in few["choices"][0]["selection"]
    assert asked == [("length@1", "base", 6), ("length@1", "base", 3)]
