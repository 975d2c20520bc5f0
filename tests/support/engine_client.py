"""A real engine asked over its own HTTP routes, and the plain Hugging Face loop that its answers are compared with."""

import asyncio
import random
import uuid
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tiny_models import NUM_TOKENS, TinyModels
from trimtab_adapters.contract.params import AdapterWeight, SteeringParams

T = TypeVar("T")
Terms = Sequence[tuple[str, float]]


@dataclass
class TwoModelReference:
    """Every model in Hugging Face, in float32, over one whole sequence at a time."""

    models: TinyModels
    loaded: dict[str, Any] = field(default_factory=dict)

    @torch.inference_mode()
    def logprobs(self, name: str, prompt: Sequence[int], output: Sequence[int]) -> Tensor:
        """`[len(output) + 1, V]` next-token log-probabilities after the prompt and after each output token."""
        if name not in self.loaded:
            directory = getattr(self.models, name)
            self.loaded[name] = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        prefix = [] if name == "base" else self.models.manifest(name).prefix_token_ids
        logits: Tensor = self.loaded[name](torch.tensor([[*prefix, *prompt, *output]])).logits[0]
        return torch.log_softmax(logits[-len(output) - 1 :, :NUM_TOKENS], dim=-1)

    def run(self, prompt: Sequence[int], terms: Terms, output: Sequence[int]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Base, steered and each adapter's log-probabilities along an output."""
        base = self.logprobs("base", prompt, output)
        adapters = [self.logprobs(name, prompt, output) for name, _ in terms]
        steered = base + sum(alpha * logprobs for (_, alpha), logprobs in zip(terms, adapters, strict=True))
        return base, torch.log_softmax(steered, dim=-1), adapters


class EngineClient:
    """The engine's own HTTP routes, without the gateway."""

    def __init__(self, client: httpx.AsyncClient, models: TinyModels) -> None:
        self.client, self.models = client, models

    async def load(self, name: str) -> None:
        version = self.models.manifest(name).version_id
        directory: Path = getattr(self.models, name)
        for route, body in (
            ("prepare", {"version": version, "path": str(directory)}),
            ("commit", {"version": version}),
        ):
            (await self.client.post(f"/trimtab/adapters/{route}", json=body)).raise_for_status()

    async def complete(
        self, prompt: Sequence[int], terms: Terms, more: dict[str, Any] | None = None, **fields: Any
    ) -> dict[str, Any]:
        """The choice of one completion with its `record`; `more` are further fields of `SteeringParams`."""
        weights = [AdapterWeight(name=n, version=self.models.manifest(n).version_id, alpha=a) for n, a in terms]
        steering = SteeringParams(uid=uuid.uuid4().hex, adapters=weights, record=True, **(more or {}))
        is_steered = steering.needs_row
        body = {"prompt": list(prompt), "ignore_eos": True, "logprobs": 0, "return_token_ids": True, **fields}
        response = await self.client.post(
            "/v1/completions", json=body | ({"vllm_xargs": steering.to_xargs()} if is_steered else {})
        )
        response.raise_for_status()
        choice: dict[str, Any] = response.json()["choices"][0]
        if is_steered:
            taken = await self.client.post("/trimtab/records/take", json={"uids": [steering.uid]})
            choice["record"] = taken.json()["records"][0]
        return choice

    async def metric(self, name: str) -> float:
        text = (await self.client.get("/metrics")).text
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name + "{"))


def with_engine(url: str, models: TinyModels, work: "Any") -> Any:
    """Run an async scenario against the engine with both adapters loaded."""

    async def scenario() -> Any:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits, trust_env=False) as client:
            engine = EngineClient(client, models)
            await engine.load("adapter")
            await engine.load("other")
            return await work(engine)

    return asyncio.run(scenario())


async def gather(jobs: Sequence[Coroutine[Any, Any, T]], concurrency: int = 16) -> list[T]:
    gate = asyncio.Semaphore(concurrency)

    async def one(job: Coroutine[Any, Any, T]) -> T:
        async with gate:
            return await job

    return list(await asyncio.gather(*(one(job) for job in jobs)))


def random_prompts(seed: int, count: int) -> list[list[int]]:
    rng = random.Random(seed)
    lengths = [rng.choice([1, 3, 17, 40, 64, 90, 150]) for _ in range(count)]
    return [[rng.randrange(1, NUM_TOKENS) for _ in range(length)] for length in lengths]
