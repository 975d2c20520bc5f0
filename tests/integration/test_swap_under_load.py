"""Adapters are swapped while 32 streams run: none fails, and each is of the one version that it reports."""

import asyncio
import random
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from gateway_process import RunningGateway
from tiny_models import NUM_TOKENS, TinyModels

pytestmark = pytest.mark.engine

NUM_STREAMS = 32
NUM_SWAPS = 20


async def one_stream(client: httpx.AsyncClient, prompt: list[int]) -> tuple[list[int], list[int], str]:
    """Prompt, greedy tokens of the `swapped` route, and the version that its chunks report."""
    body = {
        "model": "swapped",
        "prompt": prompt,
        "max_tokens": 40,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    tokens: list[int] = []
    versions: set[str] = set()
    is_done = False
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                is_done = True
                continue
            chunk = httpx.Response(200, content=line[6:]).json()
            assert "error" not in chunk, chunk
            if "steering" in chunk:
                versions |= {adapter["version"] for adapter in chunk["steering"]["adapters"]}
            for choice in chunk["choices"]:
                tokens += choice.get("token_ids") or []
    assert is_done
    (version,) = versions
    return prompt, tokens, version


def test_32_streams_survive_20_swaps_each_with_its_own_version(
    gateway: RunningGateway, tiny_models: TinyModels
) -> None:
    versions = {tiny_models.manifest(name).version_id: name for name in ("adapter", "other")}

    async def scenario() -> list[tuple[list[int], list[int], str]]:
        rng = random.Random(4)
        results: list[tuple[list[int], list[int], str]] = []
        is_over = False
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=gateway.url, timeout=300, limits=limits, trust_env=False) as client:

            async def activate(number: int) -> None:
                body = {"adapter": ("adapter", "other")[number % 2]}
                answer = await client.post("/admin/routes/swapped/activate", json=body)
                answer.raise_for_status()

            async def keep_streaming() -> None:
                while not is_over:
                    prompt = [rng.randrange(1, NUM_TOKENS) for _ in range(rng.choice([3, 20, 70]))]
                    results.append(await one_stream(client, prompt))

            await activate(0)
            streams = [asyncio.create_task(keep_streaming()) for _ in range(NUM_STREAMS)]
            for number in range(1, NUM_SWAPS + 1):
                seen = len(results)
                await activate(number)
                while len(results) < seen + 4:  # let some requests of each version begin and end
                    failed = [task for task in streams if task.done()]
                    for task in failed:
                        task.result()
                    await asyncio.sleep(0.01)
            is_over = True
            await asyncio.gather(*streams)
        return results

    results = asyncio.run(scenario())
    assert len(results) >= 4 * NUM_SWAPS
    assert {version for _, _, version in results} == set(versions)
    models: dict[str, Any] = {
        name: AutoModelForCausalLM.from_pretrained(getattr(tiny_models, name), dtype=torch.float32)
        for name in ("base", "adapter", "other")
    }
    with torch.inference_mode():
        for prompt, tokens, version in results:
            name = versions[version]
            ids = [*prompt, *tokens]
            prefix = tiny_models.manifest(name).prefix_token_ids
            base = models["base"](torch.tensor([ids])).logits[0, len(prompt) - 1 : -1, :NUM_TOKENS]
            adapter = models[name](torch.tensor([[*prefix, *ids]])).logits[0]
            adapter = adapter[len(prefix) + len(prompt) - 1 : -1, :NUM_TOKENS]
            steered = base + torch.log_softmax(adapter, dim=-1)
            assert tokens == steered.argmax(dim=-1).tolist(), version
