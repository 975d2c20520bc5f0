"""The steered engine against plain Hugging Face models in float32, with chunked prefill and preemption forced."""

import uuid
from typing import Any

import pytest
import torch
from scipy import stats

from engine_client import EngineClient, Terms, TwoModelReference, gather, random_prompts, with_engine
from tiny_models import NUM_TOKENS, TinyModels
from trimtab_adapters.contract.params import AdapterWeight, SteeringParams

pytestmark = pytest.mark.engine

CLOSE: dict[str, Any] = {"atol": 1e-4, "rtol": 0.0}


@pytest.fixture(scope="module")
def reference(tiny_models: TinyModels) -> TwoModelReference:
    return TwoModelReference(tiny_models)


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
            fields: dict[str, Any] = {"max_tokens": 24, "temperature": 0.8, "seed": 5, "logprobs": 5}
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
