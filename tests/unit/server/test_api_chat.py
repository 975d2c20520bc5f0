import json
from typing import Any

import httpx
import pytest

from fake_gateway import KIND, FakeGateway, asgi_client, build_gateway
from trimtab_server.engine.fake import FakeEngine

pytestmark = pytest.mark.anyio

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


async def chat(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post("/v1/chat/completions", json={"model": "base", "messages": MESSAGES, **body})
    assert response.status_code == 200, response.text
    data: dict[str, Any] = response.json()
    return data


async def chunks_of(client: httpx.AsyncClient, **body: Any) -> list[Any]:
    body = {"model": "base", "messages": MESSAGES, "stream": True, **body}
    text = (await client.post("/v1/chat/completions", json=body)).text
    *parts, done = [part.removeprefix("data: ") for part in text[:-2].split("\n\n")]
    assert done == "[DONE]"
    return [json.loads(part) for part in parts]


async def test_chat_answer_has_openai_shape(client: httpx.AsyncClient) -> None:
    data = await chat(client, max_tokens=3)
    assert data["id"].startswith("chatcmpl-")
    assert data["object"] == "chat.completion"
    assert set(data) == {"id", "object", "created", "model", "choices", "usage"}
    (choice,) = data["choices"]
    assert choice["message"]["role"] == "assistant"
    assert len(choice["message"]["content"].split()) == 3
    assert choice["logprobs"] is None
    assert data["usage"]["completion_tokens"] == 3


async def test_the_engine_gets_the_messages_and_is_always_asked_for_logprobs_and_ids(
    client: httpx.AsyncClient, gateway: FakeGateway
) -> None:
    fields: dict[str, Any] = {
        "max_completion_tokens": 2,
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "response_format": {"type": "json_object"},
        "reasoning_effort": "low",
        "chat_template_kwargs": {"x": 1},
        "continue_final_message": False,
        "echo": True,
    }
    await chat(client, seed=3, n=2, **fields)
    bodies = [request.body for request in gateway.engine.observed.requests]
    assert [body["seed"] for body in bodies] == [3, 4]
    expected = {**fields, "messages": MESSAGES, "logprobs": True, "return_token_ids": True}
    assert all({key: body[key] for key in expected} == expected for body in bodies)
    assert all(set(body) == {*expected, "seed"} for body in bodies)


async def test_openai_bookkeeping_fields_are_accepted_and_kept_from_the_engine(
    client: httpx.AsyncClient, gateway: FakeGateway
) -> None:
    await chat(
        client,
        store=True,
        metadata={"team": "a"},
        service_tier="auto",
        prompt_cache_key="k",
        safety_identifier="s",
        user="u",
        modalities=["text"],
    )
    assert set(gateway.engine.observed.requests[0].body) == {"messages", "logprobs", "return_token_ids"}
    assert gateway.log.rollouts[0].metadata["metadata"] == {"team": "a"}
    assert gateway.log.rollouts[0].metadata["user"] == "u"


async def test_logprobs_and_ids_are_there_only_when_asked(client: httpx.AsyncClient) -> None:
    data = await chat(client, max_tokens=2, logprobs=True, top_logprobs=1, return_token_ids=True)
    (choice,) = data["choices"]
    assert len(choice["logprobs"]["content"]) == 2
    assert len(choice["logprobs"]["content"][0]["top_logprobs"]) == 1
    assert len(choice["token_ids"]) == 2
    assert data["prompt_token_ids"]


async def test_chat_stream_starts_with_the_role_and_ends_with_a_reason(client: httpx.AsyncClient) -> None:
    chunks = await chunks_of(client, max_tokens=2, stream_options={"include_usage": True})
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]] == [None, None, "length"]
    assert chunks[-1]["usage"]["completion_tokens"] == 2
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert all("prompt_token_ids" not in chunk for chunk in chunks)


async def test_chat_streams_as_it_answers_whole(client: httpx.AsyncClient) -> None:
    texts: dict[int, str] = {}
    for chunk in await chunks_of(client, model="kind", n=2, seed=1, max_tokens=3):
        for choice in chunk["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["delta"].get("content", "")
    whole = await chat(client, model="kind", n=2, seed=1, max_tokens=3)
    assert texts == {choice["index"]: choice["message"]["content"] for choice in whole["choices"]}


async def test_best_of_is_an_extension_for_chat(client: httpx.AsyncClient, gateway: FakeGateway) -> None:
    gateway.scoring.rewards["length"] = lambda prompt, output: float(len(output))
    data = await chat(client, model="kind", best_of=4, reward="length", max_tokens=2)
    assert len(data["choices"]) == 1
    assert data["choices"][0]["selection"]["num_candidates"] == 4
    assert data["steering"]["adapters"][0]["version"] == KIND
    assert data["usage"]["completion_tokens"] == 8
    assert gateway.scoring.calls[0]["prompt"] == "Be brief.\nHi"


async def test_a_missing_chat_template_is_a_clear_400() -> None:
    async with asgi_client(build_gateway(fake=FakeEngine(has_chat_template=False)).app) as client:
        response = await client.post("/v1/chat/completions", json={"model": "base", "messages": MESSAGES})
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert "has no chat template" in message
    assert "--chat-template" in message


BAD_CHATS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": None}, "messages", "Missing required parameter: 'messages'."),
    ({"messages": []}, "messages", "empty array"),
    ({"messages": "Hi"}, "messages", "array of objects"),
    ({"messages": [1]}, "messages[0]", "expected an object"),
    ({"messages": [{"content": "Hi"}]}, "messages[0].role", "Missing required parameter"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "a string or an array"),
    ({"logprobs": 1}, "logprobs", "expected a boolean"),
    ({"top_logprobs": 3}, "top_logprobs", "only allowed when 'logprobs'"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "above maximum"),
    ({"max_tokens": 0}, "max_tokens", "below minimum"),
    ({"prompt": "Hi"}, "prompt", "Unrecognized request argument supplied: prompt"),
    ({"functions": []}, "functions", "use 'tools'"),
    ({"modalities": ["audio"]}, "modalities", "text"),
    ({"include_reasoning": False}, "include_reasoning", "token ids"),
    ({"tool_choice": 5}, "tool_choice", "string or an object"),
    ({"reasoning_effort": "huge"}, "reasoning_effort", "Supported values"),
    ({"best_of": 2, "stream": True}, "stream", "Results cannot be streamed"),
    ({"metadata": {"a": 1}}, "metadata.a", "expected a string"),
]


@pytest.mark.parametrize(("fields", "param", "message"), BAD_CHATS)
async def test_bad_chat_request_is_400_naming_the_field(
    client: httpx.AsyncClient, fields: dict[str, Any], param: str, message: str
) -> None:
    response = await client.post("/v1/chat/completions", json={"model": "base", "messages": MESSAGES, **fields})
    assert response.status_code == 400
    error = response.json()["error"]
    assert message in error["message"]
    assert error["param"] == param


async def test_media_cannot_be_steered(client: httpx.AsyncClient) -> None:
    parts = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}]
    body = {"model": "kind", "messages": [{"role": "user", "content": parts}]}
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert "cannot be steered" in response.json()["error"]["message"]
