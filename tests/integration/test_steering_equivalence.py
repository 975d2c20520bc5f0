"""The steered engine against plain Hugging Face models in float32, with chunked prefill and preemption forced."""

import asyncio
import random
import uuid
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import AutoModelForCausalLM

from tiny_models import NUM_TOKENS, TinyModels
from trimtab_adapters.contract.params import AdapterWeight, SteeringParams

pytestmark = pytest.mark.engine

CLOSE: dict[str, Any] = {"atol": 1e-4, "rtol": 0.0}
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


@pytest.fixture(scope="module")
def reference(tiny_models: TinyModels) -> TwoModelReference:
    return TwoModelReference(tiny_models)


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

    async def complete(self, prompt: Sequence[int], terms: Terms, **fields: Any) -> dict[str, Any]:
        weights = [AdapterWeight(name=n, version=self.models.manifest(n).version_id, alpha=a) for n, a in terms]
        steering = SteeringParams(uid=uuid.uuid4().hex, adapters=weights, record=True)
        body = {"prompt": list(prompt), "ignore_eos": True, "logprobs": 0, "return_token_ids": True, **fields}
        response = await self.client.post(
            "/v1/completions", json=body | ({"vllm_xargs": steering.to_xargs()} if terms else {})
        )
        response.raise_for_status()
        choice: dict[str, Any] = response.json()["choices"][0]
        if terms:
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


@pytest.mark.parametrize("terms", [[("adapter", 1.0)], [("adapter", 1.0), ("other", -0.5)]], ids=["one", "two"])
def test_greedy_tokens_and_records_equal_the_two_model_loop(
    engine_url: str, tiny_models: TinyModels, reference: TwoModelReference, terms: Terms
) -> None:
    prompts = random_prompts(len(terms), 50)

    async def work(engine: EngineClient) -> tuple[list[dict[str, Any]], float]:
        before = await engine.metric("vllm:num_preemptions_total")
        choices = await gather([engine.complete(p, terms, max_tokens=80, temperature=0) for p in prompts])
        return choices, await engine.metric("vllm:num_preemptions_total") - before

    choices, num_preemptions = with_engine(engine_url, tiny_models, work)
    print(f"{num_preemptions:.0f} preemptions")  # noqa: T201 - shown with -s
    assert num_preemptions > 0, "the test is to show that preemption does no harm, and there was none"
    for prompt, choice in zip(prompts, choices, strict=True):
        tokens, record = choice["token_ids"], choice["record"]
        base, steered, adapters = reference.run(prompt, terms, tokens)
        # A greedy loop would have chosen the same first token, hence the same second one, and so on.
        assert tokens == steered.argmax(dim=-1)[:-1].tolist() == record["token_ids"]
        column = torch.tensor(tokens)[:, None]
        want = {"base_logprobs": base, "steered_logprobs": steered}
        for name, logprobs in want.items():
            torch.testing.assert_close(torch.tensor(record[name]), logprobs[:-1].gather(1, column)[:, 0], **CLOSE)
        for got, logprobs in zip(record["adapter_logprobs"], adapters, strict=True):
            torch.testing.assert_close(torch.tensor(got), logprobs[:-1].gather(1, column)[:, 0], **CLOSE)
        kl = (steered.exp() * (steered - base)).sum(dim=-1)[:-1]
        torch.testing.assert_close(torch.tensor(record["kl"]), kl, **CLOSE)
        assert record["flipped"] == (base.argmax(dim=-1) != steered.argmax(dim=-1))[:-1].tolist()
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(record["steered_logprobs"], abs=1e-6)


def test_alpha_zero_is_the_base_bit_for_bit(engine_url: str, tiny_models: TinyModels) -> None:
    """One request at a time: vLLM's own kernels round differently in batches of another size."""

    async def work(engine: EngineClient) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        pairs = []
        for prompt in random_prompts(7, 6):
            fields = {"max_tokens": 24, "temperature": 0.8, "seed": 5, "logprobs": 5}
            pairs.append((await complete_zero(engine, prompt, fields), await engine.complete(prompt, [], **fields)))
        return pairs

    async def complete_zero(engine: EngineClient, prompt: list[int], fields: dict[str, Any]) -> dict[str, Any]:
        weight = AdapterWeight(name="a", version=tiny_models.manifest("adapter").version_id, alpha=0.0)
        xargs = SteeringParams(uid=uuid.uuid4().hex, adapters=[weight]).to_xargs()
        return await engine.complete(prompt, [], **fields, vllm_xargs=xargs)

    for zero, base in with_engine(engine_url, tiny_models, work):
        assert zero["token_ids"] == base["token_ids"]
        assert zero["logprobs"] == base["logprobs"]


def test_sampled_frequencies_are_those_of_the_product_of_experts(
    engine_url: str, tiny_models: TinyModels, reference: TwoModelReference
) -> None:
    """20,480 tokens of one context, chi-square against softmax(b + log q).

    Seeds are fixed, so the verdict is always the same; with fresh ones a right sampler would fail once in 1,000 runs.
    """
    prompt, terms = [5, 9, 33, 70, 2], [("adapter", 0.5)]
    num_requests, num_samples = 640, 32

    async def work(engine: EngineClient) -> list[int]:
        weights = [AdapterWeight(name="adapter", version=tiny_models.manifest("adapter").version_id, alpha=0.5)]

        async def draw(number: int) -> list[int]:
            xargs = SteeringParams(uid=f"draw-{number}", adapters=weights).to_xargs()
            body = {"prompt": prompt, "max_tokens": 1, "n": num_samples, "seed": number * num_samples, "logprobs": 0}
            body |= {"return_token_ids": True, "temperature": 1.0, "vllm_xargs": xargs}
            response = await engine.client.post("/v1/completions", json=body)
            response.raise_for_status()
            return [choice["token_ids"][0] for choice in response.json()["choices"]]

        return [token for tokens in await gather([draw(n) for n in range(num_requests)], 4) for token in tokens]

    tokens = with_engine(engine_url, tiny_models, work)
    assert len(tokens) == num_requests * num_samples
    _, steered, _ = reference.run(prompt, terms, [])
    expected = steered[0].exp().double() * len(tokens)
    observed = torch.bincount(torch.tensor(tokens), minlength=NUM_TOKENS).double()
    common = expected >= 5  # the usual condition for the chi-square approximation; the rest is one class
    classes = torch.cat((expected[common], expected[~common].sum()[None]))
    counts = torch.cat((observed[common], observed[~common].sum()[None]))
    assert len(classes) >= 5, "the context leaves too few likely tokens for the test to mean anything"
    statistic = float(((counts - classes) ** 2 / classes).sum())
    assert stats.chi2.sf(statistic, len(classes) - 1) > 1e-3
