from typing import Any

import httpx
import pytest

from fake_gateway import KIND, FakeGateway, asgi_client, build_gateway
from trimtab_adapters.contract.records import Rollout

pytestmark = pytest.mark.anyio


async def complete(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post("/v1/completions", json={"model": "kind", "prompt": "Hi", "max_tokens": 3, **body})
    assert response.status_code == 200, response.text
    if body.get("stream"):
        return {}
    data: dict[str, Any] = response.json()
    return data


async def test_every_candidate_is_logged_with_its_ids_and_logprobs(
    client: httpx.AsyncClient, gateway: FakeGateway
) -> None:
    data = await complete(client, seed=3, temperature=0.5, best_of=4, n=2, user="ann", logprobs=0)
    rollouts = gateway.log.rollouts
    assert len(rollouts) == 4
    assert len({rollout.id for rollout in rollouts}) == 4
    assert {rollout.request_id for rollout in rollouts} == {data["id"]}
    assert {rollout.num_candidates for rollout in rollouts} == {4}
    assert sorted(rollout.candidate_index for rollout in rollouts) == [0, 1, 2, 3]
    chosen = [rollout for rollout in rollouts if rollout.chosen]
    assert [rollout.output_text for rollout in chosen] == [choice["text"] for choice in data["choices"]]
    assert [rollout.choice_index for rollout in chosen] == [0, 1]
    assert {rollout.choice_index for rollout in rollouts if not rollout.chosen} == {None}
    first = chosen[0]
    assert (first.route, first.base_model, first.endpoint, first.prompt) == ("kind", "base", "completions", "Hi")
    assert first.prompt_token_ids == [72, 105]
    assert first.steering[0].version == KIND
    assert first.steered_logprobs == data["choices"][0]["logprobs"]["token_logprobs"]
    for values in (first.base_logprobs, first.kl, first.flipped, *(first.adapter_logprobs or [])):
        assert values is not None
        assert len(values) == len(first.output_token_ids) == 3
    assert first.finish_reason == "length"
    assert first.sampling == {"max_tokens": 3, "temperature": 0.5, "seed": 3 + first.candidate_index}
    assert first.metadata == {"user": "ann", "prompt_index": 0, "engine": "fake"}
    assert first.created_at > 0
    for rollout in rollouts:
        assert Rollout.model_validate_json(rollout.model_dump_json()) == rollout


async def test_unsteered_candidates_have_the_same_logprobs_as_base_and_steered(
    client: httpx.AsyncClient, gateway: FakeGateway
) -> None:
    data = await complete(client, model="base", logprobs=0)
    (rollout,) = gateway.log.rollouts
    assert rollout.base_logprobs == rollout.steered_logprobs == data["choices"][0]["logprobs"]["token_logprobs"]
    assert (rollout.adapter_logprobs, rollout.kl, rollout.steering) == (None, None, [])


async def test_prompts_of_ids_are_logged_without_text(client: httpx.AsyncClient, gateway: FakeGateway) -> None:
    await complete(client, prompt=[[72, 105], [89, 111]])
    assert [(r.prompt, r.prompt_token_ids) for r in gateway.log.rollouts] == [(None, [72, 105]), (None, [89, 111])]
    assert [r.metadata["prompt_index"] for r in gateway.log.rollouts] == [0, 1]


async def test_rewards_and_reference_rollouts_are_logged(client: httpx.AsyncClient, gateway: FakeGateway) -> None:
    gateway.scoring.rewards["length"] = lambda prompt, output: float(len(output))
    await complete(client, reward="length", calibration={"size": 3})
    candidate, *references = gateway.log.rollouts
    assert candidate.rewards[0].raw == len(candidate.output_text)
    assert len({rollout.id for rollout in gateway.log.rollouts}) == 4
    for rollout in references:
        assert (rollout.endpoint, rollout.chosen, rollout.steering) == ("reference", False, [])


async def test_streams_are_logged_like_whole_answers(gateway: FakeGateway) -> None:
    async with asgi_client(gateway.app) as client:
        await complete(client, seed=1, n=2)
        whole, gateway.log.rollouts = gateway.log.rollouts, []
        await complete(client, seed=1, n=2, stream=True)
    different = {"id", "request_id", "created_at", "duration_s"}
    streamed = [rollout.model_dump(exclude=different) for rollout in gateway.log.rollouts]
    assert streamed == [rollout.model_dump(exclude=different) for rollout in whole]


async def test_records_of_all_candidates_are_taken_in_one_call(gateway: FakeGateway) -> None:
    async with asgi_client(gateway.app) as client:
        await complete(client, n=4, stream=True)
        await complete(client, n=4)
    assert [len(uids) for uids in gateway.engine.observed.taken] == [4, 4]


async def test_records_are_not_asked_when_nobody_wants_them() -> None:
    gateway = build_gateway(rollouts="off")
    async with asgi_client(gateway.app) as client:
        await complete(client)
        await complete(client, stream=True)
        await complete(client, steering_logprobs=True)
    asked = [r.steering.record for r in gateway.engine.observed.requests if r.steering is not None]
    assert asked == [False, False, True]
    assert len(gateway.engine.observed.taken) == 1
    assert gateway.log.rollouts == []


async def test_the_callers_request_id_is_in_the_metadata(gateway: FakeGateway) -> None:
    async with asgi_client(gateway.app, **{"x-request-id": "trace"}) as client:
        await complete(client)
        await complete(client)
    assert [rollout.metadata["x_request_id"] for rollout in gateway.log.rollouts] == ["trace", "trace"]
    assert len({rollout.id for rollout in gateway.log.rollouts}) == 2


async def test_chats_are_logged_with_the_texts_of_their_messages(
    client: httpx.AsyncClient, gateway: FakeGateway
) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, {"role": "user", "content": "you"}]
    await client.post("/v1/chat/completions", json={"model": "kind", "messages": messages, "max_tokens": 2})
    (rollout,) = gateway.log.rollouts
    assert (rollout.endpoint, rollout.prompt) == ("chat.completions", "Hi\nyou")
    assert "messages" not in rollout.sampling
