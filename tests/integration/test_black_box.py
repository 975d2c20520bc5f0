"""A real vLLM server treated as a black box: top log-probabilities over HTTP, adapters in the gateway.

What the gateway answers must equal white-box steering, by plain Hugging Face models in float32, restricted to the top k
tokens of the base.
"""

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import openai
import pytest
import torch
from scipy import stats
from torch import Tensor

from engine_client import Terms, TwoModelReference, gather, random_prompts
from gateway_process import RunningGateway, black_box_gateway
from tiny_models import NUM_TOKENS, TinyModels

pytestmark = pytest.mark.engine

TOP_K = 12
CLOSE: dict[str, Any] = {"atol": 1e-4, "rtol": 0.0}


@pytest.fixture(scope="module")
def reference(tiny_models: TinyModels) -> TwoModelReference:
    return TwoModelReference(tiny_models)


@pytest.fixture(scope="module")
def black_box(
    engine_url: str, tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningGateway]:
    """A gateway that knows nothing of the engine but its completions API."""
    with black_box_gateway(
        tmp_path_factory.mktemp("black-box"),
        engine_url,
        tiny_models.base,
        *("--adapter", f"adapter={tiny_models.adapter}", "--adapter", f"other={tiny_models.other}"),
        *("--black-box-logprobs", str(TOP_K)),
    ) as started:
        yield started


def restricted(base: Tensor, adapters: list[Tensor], terms: Terms) -> tuple[Tensor, Tensor]:
    """Base and steered log-probabilities `[T, V]` where only the base's top k exist."""
    kth = base.topk(TOP_K, dim=-1).values[:, -1:]
    top = base.masked_fill(base < kth, -torch.inf)
    steered = top + sum(alpha * logprobs for (_, alpha), logprobs in zip(terms, adapters, strict=True))
    return torch.log_softmax(top, dim=-1), torch.log_softmax(steered, dim=-1)


def steering_of(terms: Terms) -> dict[str, Any]:
    return {"adapters": [{"name": name, "alpha": alpha} for name, alpha in terms]}


@pytest.mark.parametrize("terms", [[("adapter", 1.0)], [("adapter", 1.0), ("other", -0.5)]], ids=["one", "two"])
def test_greedy_answers_equal_white_box_steering_of_the_top_k(
    black_box: RunningGateway, reference: TwoModelReference, terms: Terms
) -> None:
    prompts = random_prompts(31 + len(terms), 12)
    body = {
        "model": "base",
        "max_tokens": 24,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 0,
        "return_token_ids": True,
        "steering": steering_of(terms),
        "steering_logprobs": True,
    }

    async def work() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(base_url=black_box.url, timeout=300, trust_env=False) as client:

            async def ask(prompt: list[int]) -> dict[str, Any]:
                response = await client.post("/v1/completions", json={**body, "prompt": prompt})
                assert response.status_code == 200, response.text
                answer: dict[str, Any] = response.json()
                return answer

            return await gather([ask(prompt) for prompt in prompts], 6)

    num_flipped = 0
    for prompt, answer in zip(prompts, asyncio.run(work()), strict=True):
        choice = answer["choices"][0]
        tokens, record = choice["token_ids"], choice["steering_logprobs"]
        assert len(tokens) == 24
        whole, _, adapters = reference.run(prompt, terms, tokens)
        base, steered = restricted(whole, adapters, terms)
        # A greedy loop would have chosen the same first token, hence the same second one, and so on.
        assert tokens == steered.argmax(dim=-1)[:-1].tolist() == record["token_ids"]
        column = torch.tensor(tokens)[:, None]
        for name, logprobs in (("base", base), ("steered", steered)):
            torch.testing.assert_close(torch.tensor(record[name]), logprobs[:-1].gather(1, column)[:, 0], **CLOSE)
        for got, logprobs in zip(record["adapter"], adapters, strict=True):
            torch.testing.assert_close(torch.tensor(got), logprobs[:-1].gather(1, column)[:, 0], **CLOSE)
        kl = torch.where(torch.isinf(steered), 0.0, steered.exp() * (steered - base)).sum(dim=-1)[:-1]
        torch.testing.assert_close(torch.tensor(record["kl"]), kl, **CLOSE)
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(record["steered"], abs=1e-6)
        num_flipped += sum(record["flipped"])
        billed = answer["usage"]["black_box"]
        n = len(prompt)
        assert billed["calls"] == billed["completion_tokens"] == 24
        assert billed["prompt_tokens"] == 24 * n + sum(range(24))  # the prompt and the answer so far, each time
        assert answer["usage"]["prompt_tokens"] == n
    assert num_flipped > 0, "steering that changes nothing shows nothing"


def test_sampled_first_tokens_follow_white_box_steering_of_the_top_k(
    black_box: RunningGateway, reference: TwoModelReference
) -> None:
    """4,096 tokens of one context, chi-square against softmax over the top k of b + 0.5 log q.

    Seeds are fixed, so the verdict is always the same; with fresh ones a right sampler would fail once in 1,000 runs.
    """
    prompt, terms, num_requests, n = [5, 9, 33, 70, 2], [("adapter", 0.5)], 32, 128

    async def work() -> list[int]:
        async with httpx.AsyncClient(base_url=black_box.url, timeout=300, trust_env=False) as client:

            async def ask(number: int) -> list[int]:
                body = {"model": "base", "prompt": prompt, "max_tokens": 1, "n": n, "seed": number * n}
                body |= {"steering": steering_of(terms), "return_token_ids": True}
                response = await client.post("/v1/completions", json=body)
                assert response.status_code == 200, response.text
                answer = response.json()
                assert answer["usage"]["black_box"]["calls"] < n, "candidates of one prompt share the first call"
                return [choice["token_ids"][0] for choice in answer["choices"]]

            return [token for tokens in await gather([ask(i) for i in range(num_requests)], 2) for token in tokens]

    tokens = asyncio.run(work())
    whole, _, adapters = reference.run(prompt, terms, [])
    _, steered = restricted(whole, adapters, terms)
    expected = steered[0].exp().double() * len(tokens)
    observed = torch.bincount(torch.tensor(tokens), minlength=NUM_TOKENS).double()
    assert observed[expected == 0].sum() == 0, "a token beyond the top k"
    common = expected >= 5
    classes = torch.cat((expected[common], expected[~common].sum()[None]))
    counts = torch.cat((observed[common], observed[~common].sum()[None]))
    if classes[-1] < 5:  # too rare for a class of its own
        classes, counts = classes[:-1], counts[:-1]
    assert len(classes) >= 4, "the context leaves too few likely tokens for the test to mean anything"
    statistic = float(((counts - classes) ** 2 / classes).sum())
    assert stats.chi2.sf(statistic, len(classes) - 1) > 1e-3


def test_an_api_that_writes_tokens_as_text_gives_the_same_answers(
    black_box: RunningGateway, engine_url: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    """Without vLLM's token ids, and with a prompt of text; the residual and lookahead besides, seen to act."""
    adapter = ("--adapter", f"adapter={tiny_models.adapter}", "--black-box-logprobs", str(TOP_K))
    body = {"model": "adapter", "prompt": "t5 t9 t33", "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    with black_box.client() as client:
        expected = client.post("/v1/completions", json=body).json()
    settings = {"TRIMTAB_BLACK_BOX_PROMPT": "text", "TRIMTAB_BLACK_BOX_LOOKAHEAD": "4"}
    with (
        mock.patch.dict(os.environ, settings),
        black_box_gateway(tmp_path, engine_url, tiny_models.base, *adapter, api="openai") as plain,
        plain.client() as client,
    ):
        answer = client.post("/v1/completions", json=body).json()
    assert answer["choices"][0]["text"] == expected["choices"][0]["text"]
    assert answer["usage"]["black_box"]["completion_tokens"] > 16
    assert answer["usage"]["black_box"]["unmapped_tokens"] == 0


def test_openais_client_chats_streams_and_completes(black_box: RunningGateway) -> None:
    client = openai.OpenAI(base_url=f"{black_box.url}/v1", api_key="none", max_retries=0)
    messages: Any = [{"role": "user", "content": "t5 t9 t33"}]
    whole = client.chat.completions.create(
        model="adapter", messages=messages, max_tokens=8, temperature=0, logprobs=True, top_logprobs=3
    )
    assert whole.usage is not None
    assert whole.choices[0].logprobs is not None
    assert len(whole.choices[0].logprobs.content or []) == whole.usage.completion_tokens
    chunks = list(
        client.chat.completions.create(model="adapter", messages=messages, max_tokens=8, temperature=0, stream=True)
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    same = client.completions.create(model="adapter", prompt="t5 t9 t33", max_tokens=8, temperature=0)
    assert same.choices[0].text == whole.choices[0].message.content
    plain = client.completions.create(model="base", prompt="t5 t9 t33", max_tokens=8, temperature=0)
    assert plain.choices[0].text != same.choices[0].text


def test_an_unsteered_answer_is_one_call_and_the_engines_own(black_box: RunningGateway, engine_url: str) -> None:
    body = {"prompt": [5, 9, 33], "max_tokens": 12, "temperature": 0.9, "seed": 4, "ignore_eos": True, "logprobs": 2}
    own = httpx.post(f"{engine_url}/v1/completions", json={"model": "base", **body}, timeout=60, trust_env=False).json()
    with black_box.client() as client:
        answer = client.post("/v1/completions", json={"model": "base", **body}).json()
    assert answer["choices"][0]["text"] == own["choices"][0]["text"]
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == own["choices"][0]["logprobs"]["token_logprobs"]
    assert answer["usage"]["black_box"]["calls"] == 1
    assert answer["usage"]["black_box"]["prompt_tokens"] == 3


def test_a_route_is_swapped_and_rollouts_and_metrics_tell_of_it(
    black_box: RunningGateway, tiny_models: TinyModels
) -> None:
    adapter, other = tiny_models.manifest("adapter").version_id, tiny_models.manifest("other").version_id
    body = {"model": "swapped", "prompt": [5, 9, 33], "max_tokens": 10, "temperature": 0, "ignore_eos": True}
    with black_box.client() as client:
        texts = []
        for name in ("adapter", "other", "adapter"):
            client.put("/admin/routes/swapped", json={"steering": steering_of([(name, 1.0)])}).raise_for_status()
            answer = client.post("/v1/completions", json=body).json()
            texts.append(answer["choices"][0]["text"])
        assert texts[0] == texts[2] != texts[1]
        lines = client.get("/admin/rollouts/export", params={"format": "jsonl"}).text.splitlines()
        metrics = client.get("/metrics").text
        engines = client.get("/admin/engines").json()["data"]
        assert client.get("/ready").status_code == 200
    rollouts = sorted((json.loads(line) for line in lines), key=lambda rollout: float(rollout["created_at"]))
    rollouts = [rollout for rollout in rollouts if rollout["route"] == "swapped"]
    assert [rollout["steering"][0]["version"] for rollout in rollouts] == [adapter, other, adapter]
    assert all(len(r["base_logprobs"]) == len(r["steered_logprobs"]) == 10 for r in rollouts)
    assert engines[0]["status"]["kind"] == "black_box"
    calls = next(line for line in metrics.splitlines() if line.startswith("trimtab:black_box_calls_total"))
    assert float(calls.split()[1]) > 0


def test_best_of_n_by_a_reward_works_over_a_black_box(black_box: RunningGateway) -> None:
    with black_box.client() as client:
        client.post("/admin/rewards", json={"name": "ones", "kind": "regex", "target": "t1"}).raise_for_status()
        body = {"model": "adapter", "prompt": [5, 9, 33], "max_tokens": 6, "best_of": 4, "seed": 1, "reward": "ones"}
        answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["selection"]["num_candidates"] == 4
