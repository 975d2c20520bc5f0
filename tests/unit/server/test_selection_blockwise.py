"""Blockwise best of K: each block is the best continuation, and the answer is one text in one stream."""

import json
from typing import Any

import httpx
import pytest

from fake_gateway import KIND, FakeGateway
from selecting import answer, chosen_text, post
from trimtab_server.engine import fake_model

pytestmark = pytest.mark.anyio

BLOCKWISE = {"strategy": "blockwise", "block_tokens": 4}


def pseudo_reward(prompt: str, output: str) -> float:
    """A number that depends on every letter and on nothing else."""
    return sum((i + 1) * ord(letter) for i, letter in enumerate(output)) * 0.6180339887 % 1.0


def grown(prompt: list[int], num_tokens: int, block: int, best_of: int, seed: int) -> tuple[list[int], str]:
    """The rule, written down again over the fake model."""
    tokens: list[int] = []
    number = 0
    while len(tokens) < num_tokens:
        size = min(block, num_tokens - len(tokens))
        options = []
        for k in range(best_of):
            seeded = seed + number * best_of + k
            options.append(
                [fake_model.next_token(prompt + tokens, i, (), seed=seeded, greedy=False).id for i in range(size)]
            )
        texts = [fake_model.detokenize(tokens + option) for option in options]
        tokens += options[max(range(best_of), key=lambda k: pseudo_reward("", texts[k]))]
        number += 1
    return tokens, fake_model.detokenize(tokens)


@pytest.fixture
def gateway(gateway: FakeGateway) -> FakeGateway:
    gateway.scoring.rewards["pseudo"] = pseudo_reward
    gateway.scoring.fixed = [0.5]
    return gateway


@pytest.mark.parametrize("seed", range(6))
async def test_each_block_is_the_best_continuation(client: httpx.AsyncClient, seed: int) -> None:
    tokens, text = grown([72, 105], 14, 4, 3, seed)
    data = await answer(
        client,
        seed=seed,
        best_of=3,
        reward="pseudo",
        max_tokens=14,
        selection=BLOCKWISE,
        return_token_ids=True,
        logprobs=0,
    )
    (choice,) = data["choices"]
    assert (choice["token_ids"], choice["text"], choice["finish_reason"]) == (tokens, text, "length")
    told = choice["selection"]
    assert (told["num_blocks"], told["discarded_tokens"]) == (4, 2 * 14)
    assert data["usage"] == {"prompt_tokens": 2, "completion_tokens": 3 * 14, "total_tokens": 2 + 3 * 14}
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == text
    assert logprobs["text_offset"] == [sum(map(len, logprobs["tokens"][:i])) for i in range(14)]


async def test_it_streams_block_by_block_with_the_same_result(client: httpx.AsyncClient) -> None:
    body: dict[str, Any] = {"seed": 1, "best_of": 3, "reward": "pseudo", "max_tokens": 14, "selection": BLOCKWISE}
    whole = await answer(client, **body)
    response = await post(client, stream=True, stream_options={"include_usage": True}, **body)
    *events, usage, done = [part.removeprefix("data: ") for part in response.text.strip().split("\n\n")]
    assert done == "[DONE]"
    chunks = [json.loads(event) for event in events]
    pieces = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(pieces) == chosen_text(whole)
    assert len([piece for piece in pieces if piece]) == 4
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [*[None] * (len(chunks) - 1), "length"]
    assert chunks[-1]["choices"][0]["selection"]["num_blocks"] == 4
    assert json.loads(usage)["usage"] == whole["usage"]


async def test_a_stop_string_across_two_blocks_ends_the_answer_and_is_not_streamed(client: httpx.AsyncClient) -> None:
    body: dict[str, Any] = {"seed": 2, "best_of": 3, "reward": "pseudo", "max_tokens": 16, "selection": BLOCKWISE}
    plain = await answer(client, return_token_ids=True, **body)
    text, tokens = chosen_text(plain), plain["choices"][0]["token_ids"]
    block_end = len(fake_model.detokenize(tokens[:8]))
    stop = text[block_end - 3 : block_end + 4]
    assert text.count(stop) == 1
    stopped = await answer(client, stop=[stop], return_token_ids=True, **body)
    (choice,) = stopped["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (text[: block_end - 3], "stop", stop)
    assert choice["token_ids"] == tokens[:9]  # the token in which the stop string ends is the last
    included = await answer(client, stop=[stop], include_stop_str_in_output=True, **body)
    assert chosen_text(included) == text[: block_end + 4]
    response = await post(client, stop=[stop], stream=True, **body)
    events = [json.loads(part[6:]) for part in response.text.strip().split("\n\n")[:-1]]
    assert "".join(event["choices"][0]["text"] for event in events) == text[: block_end - 3]


async def test_a_steered_answer_has_one_record_of_all_its_blocks(
    client: httpx.AsyncClient, gateway: FakeGateway
) -> None:
    data = await answer(
        client,
        model="kind",
        best_of=2,
        reward="pseudo",
        max_tokens=10,
        selection=BLOCKWISE,
        steering_logprobs=True,
        return_token_ids=True,
        seed=1,
    )
    told, tokens = data["choices"][0]["steering_logprobs"], data["choices"][0]["token_ids"]
    assert told["token_ids"] == tokens
    assert len(told["base"]) == len(told["adapter"][0]) == len(told["kl"]) == 10
    (rollout,) = gateway.log.rollouts
    assert rollout.output_token_ids == tokens
    assert not rollout.is_plain  # it is no sample of the tailored policy
    assert [weight.version for weight in rollout.steering] == [KIND]


async def test_a_negative_prompt_grows_with_the_answer(client: httpx.AsyncClient, gateway: FakeGateway) -> None:
    data = await answer(
        client,
        best_of=2,
        reward="pseudo",
        max_tokens=8,
        selection=BLOCKWISE,
        steering={"negative_prompt": [65, 66], "guidance_scale": 2.0},
        return_token_ids=True,
        seed=1,
    )
    tokens = data["choices"][0]["token_ids"]
    seen = [
        r.steering.guidance.token_ids for r in gateway.engine.observed.requests if r.steering and r.steering.guidance
    ]
    assert seen == [[65, 66]] * 2 + [[65, 66, *tokens[:4]]] * 2


async def test_chats_continue_from_the_ids_of_their_template(client: httpx.AsyncClient, gateway: FakeGateway) -> None:
    body = {
        "model": "base",
        "messages": [{"role": "user", "content": "Hi"}],
        "best_of": 2,
        "reward": "pseudo",
        "max_tokens": 8,
        "selection": BLOCKWISE,
        "seed": 4,
    }
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    prompt = fake_model.tokenize(fake_model.render_chat(body["messages"]))  # type: ignore[arg-type]
    tokens, text = grown(prompt, 8, 4, 2, 4)
    shown = await client.post("/v1/chat/completions", json={**body, "logprobs": True, "top_logprobs": 1})
    content = shown.json()["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == [fake_model.token_text(token) for token in tokens]
    assert all(entry["top_logprobs"][0]["logprob"] == entry["logprob"] for entry in content)
    assert response.json()["choices"][0]["logprobs"] is None
    assert response.json()["choices"][0]["message"] == {"role": "assistant", "content": text}
    assert {request.endpoint for request in gateway.engine.observed.requests} == {"completions"}


async def test_fields_that_ask_for_nothing_are_accepted(client: httpx.AsyncClient) -> None:
    extra = {"response_format": {"type": "text"}, "presence_penalty": 0.0, "stop": []}
    body = {"best_of": 3, "reward": "pseudo", "max_tokens": 8, "selection": BLOCKWISE, **extra}
    assert (await post(client, **body)).status_code == 200


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"bad_words": ["x"]}, "bad_words"),
        ({"n": 2}, "n"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"model": "kind", "steering": {"schedule": {"first": 3}}}, "steering.schedule"),
    ],
)
async def test_what_counts_over_the_whole_answer_is_refused(
    client: httpx.AsyncClient, gateway: FakeGateway, extra: dict[str, Any], param: str
) -> None:
    response = await post(
        client, **{"best_of": 3, "reward": "pseudo", "max_tokens": 8, "selection": BLOCKWISE, **extra}
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert gateway.engine.observed.requests == []
