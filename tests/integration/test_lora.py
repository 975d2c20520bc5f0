"""Two LoRAs of one small LM, and the LM itself, steering requests of one batch in a real engine."""

import asyncio
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lora_directories import merged, write_lora
from tiny_models import NUM_TOKENS, TinyModels
from trimtab_adapters.contract.params import AdapterWeight, SteeringParams
from trimtab_adapters.store import VersionStore

pytestmark = pytest.mark.engine

CLOSE: dict[str, Any] = {"atol": 1e-4, "rtol": 0.0}
NUM_OUTPUT = 40


@torch.inference_mode()
def logprobs(model: Any, prompt: Sequence[int], output: Sequence[int]) -> Tensor:
    """`[len(output), V]` next-token log-probabilities before each output token."""
    logits: Tensor = model(torch.tensor([[*prompt, *output]])).logits[0]
    return torch.log_softmax(logits[-len(output) - 1 : -1, :NUM_TOKENS], dim=-1)


async def load(client: httpx.AsyncClient, version: str, path: Path) -> None:
    for route, body in (("prepare", {"version": version, "path": str(path)}), ("commit", {"version": version})):
        (await client.post(f"/trimtab/adapters/{route}", json=body)).raise_for_status()


async def complete(client: httpx.AsyncClient, prompt: Sequence[int], terms: Sequence[tuple[str, float]]) -> Any:
    weights = [AdapterWeight(name="a", version=version, alpha=alpha) for version, alpha in terms]
    steering = SteeringParams(uid=uuid.uuid4().hex, adapters=weights, record=True)
    body = {"prompt": list(prompt), "max_tokens": NUM_OUTPUT, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    body |= {"return_token_ids": True, "vllm_xargs": steering.to_xargs()}
    response = await client.post("/v1/completions", json=body)
    response.raise_for_status()
    taken = await client.post("/trimtab/records/take", json={"uids": [steering.uid]})
    return response.json()["choices"][0]["token_ids"], taken.json()["records"][0]


def test_loras_of_one_trunk_in_one_batch_equal_their_merged_weights(
    engine_url: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    trunk = tiny_models.adapter
    store = VersionStore(tmp_path / "store")
    loras = [write_lora(tmp_path / f"lora-{n}", trunk, seed=n, r=2 + n) for n in range(2)]
    stored = [store.add(lora, name=f"lora-{n}", trunk=trunk) for n, lora in enumerate(loras)]
    first, second = (manifest.version_id for manifest, _ in stored)
    whole = tiny_models.manifest("adapter").version_id
    models = {version: merged(trunk, lora) for version, lora in zip((first, second), loras, strict=True)}
    models[whole] = AutoModelForCausalLM.from_pretrained(trunk, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny_models.base, dtype=torch.float32)
    mixtures: list[list[tuple[str, float]]] = [
        *([(first, 1.0)], [(second, 1.0)], [(first, 1.0), (second, -0.5)], [(whole, 1.0), (first, 0.5)]),
    ]
    jobs = [
        ([1 + (17 * number + place) % 120 for place in range(length)], mixtures[number % 4])
        for number, length in enumerate([1, 3, 17, 40, 64, 90, 150, 2, 33, 70, 5, 120])
    ]

    async def work() -> tuple[list[Any], dict[str, Any]]:
        async with httpx.AsyncClient(base_url=engine_url, timeout=300, trust_env=False) as client:
            for manifest, path in stored:
                await load(client, manifest.version_id, path)
            await load(client, whole, trunk)
            answers = await asyncio.gather(*(complete(client, prompt, terms) for prompt, terms in jobs))
            status = (await client.get("/trimtab/status")).json()
            for version in (first, second):
                (await client.post("/trimtab/adapters/retire", json={"version": version})).raise_for_status()
            return answers, status

    answers, status = asyncio.run(work())
    for (prompt, terms), (tokens, record) in zip(jobs, answers, strict=True):
        adapters = [logprobs(models[version], prompt, tokens) for version, _ in terms]
        steered = logprobs(base, prompt, tokens) + sum(
            alpha * adapter for (_, alpha), adapter in zip(terms, adapters, strict=True)
        )
        # A greedy loop would have chosen the same first token, hence the same second one, and so on.
        assert tokens == steered.argmax(dim=-1).tolist()
        column = torch.tensor(tokens)[:, None]
        for got, adapter in zip(record["adapter_logprobs"], adapters, strict=True):
            torch.testing.assert_close(torch.tensor(got), adapter.gather(1, column)[:, 0], **CLOSE)
    by_version = {loaded["version"]: loaded for loaded in status["versions"]}
    shared = by_version[first]["weight_bytes"] + by_version[second]["weight_bytes"]
    assert shared < by_version[whole]["weight_bytes"]
    assert by_version[first]["activity"]["rows"] >= 6 * NUM_OUTPUT
