"""The equivalence suite under vLLM's real Model Runner V2, and what only a real one shows. Needs a CUDA device.

Not run so far: Trimtab was written on a machine without a GPU. What it would prove is listed in
`docs/decisions/0012-model-runner-v2.md`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integration.test_steering_equivalence import (
    reference,
    test_alpha_zero_is_the_base_bit_for_bit,
    test_greedy_tokens_and_records_equal_the_two_model_loop,
    test_sampled_frequencies_are_those_of_the_product_of_experts,
)

from engine_client import EngineClient, TwoModelReference, gather, random_prompts, with_engine
from engine_process import ENGINE, free_port, running
from tiny_models import TinyModels
from trimtab_adapters.contract.params import AdapterWeight, SteeringParams

pytestmark = [
    pytest.mark.engine,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM's Model Runner V2 needs a CUDA device"),
]

__all__ = [
    "reference",
    "test_alpha_zero_is_the_base_bit_for_bit",
    "test_greedy_tokens_and_records_equal_the_two_model_loop",
    "test_sampled_frequencies_are_those_of_the_product_of_experts",
]
"""Collected here a second time, with the `engine_url` of this folder."""

TERMS = [("adapter", 1.0)]


@pytest.fixture(scope="module")
def usual_engine_url(tiny_models: TinyModels, logs: Path) -> Iterator[str]:
    """Compiled, with CUDA graphs and vLLM's warm-up requests, scheduled asynchronously: the defaults on a GPU."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    arguments = ("--model-runner=v2", "--dtype=float32", "--max-model-len=256", "--gpu-memory-utilization=0.4")
    command = [*ENGINE, f"--model={tiny_models.base}", "--served-model-name=base", f"--port={port}", *arguments]
    with running(command, f"{url}/trimtab/status", logs / "engine-v2-usual.log"):
        yield url


async def settled_status(engine: EngineClient) -> dict[str, Any]:
    """The status once no row is held. Rows are let go in the step after their request ended, so it may take two."""
    for _ in range(100):
        status: dict[str, Any] = (await engine.client.get("/trimtab/status")).json()
        if not any(version["active_rows"] for version in status["versions"]):
            return status
    raise AssertionError(f"rows are still held: {status}")


def test_the_engine_runs_v2_and_holds_nothing_when_its_requests_are_gone(
    engine_url: str, tiny_models: TinyModels
) -> None:
    async def work(engine: EngineClient) -> dict[str, Any]:
        await gather([engine.complete(p, TERMS, max_tokens=8, temperature=0) for p in random_prompts(3, 24)])
        return await settled_status(engine)

    status = with_engine(engine_url, tiny_models, work)
    assert (status["runner"], status["failed_rows"], status["cache"]["used_blocks"]) == ("v2", 0, 0)


def test_aborted_requests_let_go_of_their_rows(engine_url: str, tiny_models: TinyModels) -> None:
    async def work(engine: EngineClient) -> dict[str, Any]:
        weight = AdapterWeight(name="a", version=tiny_models.manifest("adapter").version_id, alpha=1.0)
        for number in range(4):
            xargs = SteeringParams(uid=f"aborted-{number}", adapters=[weight]).to_xargs()
            body = {"prompt": [5, 9, 33], "max_tokens": 200, "stream": True, "ignore_eos": True, "logprobs": 0}
            async with engine.client.stream("POST", "/v1/completions", json=body | {"vllm_xargs": xargs}) as response:
                await anext(response.aiter_lines())  # leaving here closes the connection
        await engine.complete([1, 2, 3], TERMS, max_tokens=100, temperature=0)
        return await settled_status(engine)

    assert with_engine(engine_url, tiny_models, work)["cache"]["used_blocks"] == 0


def test_an_engine_with_vllms_defaults_samples_the_same_tokens(
    usual_engine_url: str, tiny_models: TinyModels, reference: TwoModelReference
) -> None:
    prompts = random_prompts(11, 24)

    async def work(engine: EngineClient) -> list[list[int]]:
        choices = await gather([engine.complete(p, TERMS, max_tokens=32, temperature=0) for p in prompts])
        return [choice["token_ids"] for choice in choices]

    for prompt, tokens in zip(prompts, with_engine(usual_engine_url, tiny_models, work), strict=True):
        _, steered, _ = reference.run(prompt, TERMS, tokens)
        assert tokens == steered.argmax(dim=-1)[:-1].tolist()
