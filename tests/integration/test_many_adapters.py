"""Twelve versions behind an engine with room for three: all are asked for at once, and each answers as itself."""

import asyncio
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from engine_process import TINY_ENGINE_ARGS
from gateway_process import RunningGateway, running_gateway
from tiny_models import NUM_TOKENS, TinyModels, write_llama, write_tokenizer
from trimtab_adapters.weights_file import tensor_bytes

pytestmark = pytest.mark.engine

NUM_VERSIONS = 12
NUM_RESIDENT = 3
NUM_TOKENS_ASKED = 12


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("many")
    found = [root / f"a{number}" for number in range(NUM_VERSIONS)]
    for number, directory in enumerate(found):
        write_llama(directory, seed=100 + number, num_layers=1, width=64, max_length=1024)
        write_tokenizer(directory)
    return found


@pytest.fixture(scope="module")
def small_gateway(
    tiny_models: TinyModels, directories: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningGateway]:
    budget = NUM_RESIDENT * tensor_bytes(directories[0] / "model.safetensors")
    arguments = (*TINY_ENGINE_ARGS[1:], f"--adapter-memory={budget}")
    with running_gateway(
        tmp_path_factory.mktemp("small"), "--model", str(tiny_models.base), engine_args=arguments
    ) as started:
        yield started


async def ask(client: httpx.AsyncClient, number: int, prompt: list[int]) -> tuple[int, list[int], list[int]]:
    body = {
        "model": "base",
        "prompt": prompt,
        "max_tokens": NUM_TOKENS_ASKED,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "steering": {"adapters": [{"name": f"a{number}"}]},
    }
    answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return number, prompt, answer.json()["choices"][0]["token_ids"]


def metric(text: str, name: str) -> float:
    (line,) = [line for line in text.splitlines() if line.startswith(f"trimtab:{name} ")]
    return float(line.split()[1])


def test_requests_for_more_versions_than_fit_are_all_answered_and_steered(
    small_gateway: RunningGateway, tiny_models: TinyModels, directories: list[Path]
) -> None:
    rng = random.Random(6)
    asked = [number for number in range(NUM_VERSIONS) for _ in range(3)]
    rng.shuffle(asked)

    async def scenario() -> tuple[list[tuple[int, list[int], list[int]]], dict[str, Any], str]:
        async with httpx.AsyncClient(base_url=small_gateway.url, timeout=300, trust_env=False) as client:
            for number, directory in enumerate(directories):
                answer = await client.post("/admin/adapters", json={"name": f"a{number}", "path": str(directory)})
                assert answer.status_code == 200, answer.text
            prompts = [[rng.randrange(1, NUM_TOKENS) for _ in range(rng.choice([3, 20, 70]))] for _ in asked]
            results = await asyncio.gather(*map(ask, [client] * len(asked), asked, prompts))
            status = (await client.get("/admin/engines")).json()["data"][0]["status"]
            return list(results), status, (await client.get("/metrics")).text

    results, status, metrics = asyncio.run(scenario())
    assert status["weights"]["used_bytes"] <= status["weights"]["budget_bytes"]
    assert metric(metrics, "adapter_evictions_total") >= NUM_VERSIONS - NUM_RESIDENT
    assert metric(metrics, "adapter_versions_resident") <= NUM_RESIDENT
    assert metric(metrics, "adapter_memory_refusals_total") == 0
    base = AutoModelForCausalLM.from_pretrained(tiny_models.base, dtype=torch.float32)
    adapters = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in directories]
    with torch.inference_mode():
        for number, prompt, tokens in results:
            ids = torch.tensor([[*prompt, *tokens]])
            logits = base(ids).logits + torch.log_softmax(adapters[number](ids).logits, dim=-1)
            steered = logits[0, len(prompt) - 1 : -1, :NUM_TOKENS]
            chosen = steered.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            # One prompt has two tokens 0.0001 nats apart, where float32 rounding decides.
            assert float((steered.max(dim=-1).values - chosen).max()) < 1e-3, number


def test_a_version_that_never_fits_is_refused_when_it_is_registered(
    small_gateway: RunningGateway, tiny_models: TinyModels, tmp_path: Path
) -> None:
    large = tmp_path / "large"
    write_llama(large, seed=7, num_layers=4, width=128, max_length=1024)
    shutil.copy(tiny_models.base / "tokenizer.json", large)
    with small_gateway.client() as client:
        answer = client.post("/admin/adapters", json={"name": "large", "path": str(large)})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "adapter_too_large")
