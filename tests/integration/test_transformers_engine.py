"""`trimtab serve --engine-kind transformers`: an encoder-decoder base behind the same API, trained and served."""

import asyncio
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import openai
import pytest
import torch
from torch import Tensor

from engine_client import TwoModelReference, random_prompts
from gateway_process import RunningGateway, running_gateway
from tiny_blenderbot import blenderbot_logprobs, tiny_blenderbot, write_blenderbot
from tiny_models import TinyModels, write_llama, write_tokenizer
from trimtab_training.config import parse_config
from trimtab_training.gateway import GatewayClient
from trimtab_training.recipes.train import train

SEED = 5
PROMPT = [3, 4, 5, 6]
BLOCKWISE: dict[str, Any] = {"selection": {"strategy": "blockwise", "block_tokens": 4}}
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "return_token_ids": True, "logprobs": 0}


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("blenderbot")
    write_blenderbot(directory, seed=SEED)
    return directory


@pytest.fixture(scope="module")
def gateway(
    base_dir: Path, tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningGateway]:
    arguments = ("--engine-kind", "transformers", "--model", str(base_dir))
    with (
        mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}),  # threads of tiny models wait for each other
        running_gateway(
            tmp_path_factory.mktemp("transformers"), *arguments, "--adapter", f"adapter={tiny_models.adapter}"
        ) as started,
    ):
        with started.client() as http:
            spec = {"name": "sevens", "kind": "regex", "target": "t7", "options": {"value": "count"}}
            assert http.post("/admin/rewards", json=spec).status_code < 300
        yield started


@pytest.fixture(scope="module")
def client(gateway: RunningGateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def reference(tiny_models: TinyModels) -> TwoModelReference:
    return TwoModelReference(tiny_models)


def steered_logprobs(reference: TwoModelReference, prompt: Sequence[int], output: Sequence[int]) -> Tensor:
    base = blenderbot_logprobs(tiny_blenderbot(seed=SEED), prompt, output)
    return torch.log_softmax(base + reference.logprobs("adapter", prompt, output), dim=-1)


def test_the_official_client_gets_steered_answers(client: openai.OpenAI, reference: TwoModelReference) -> None:
    num_flipped = 0
    for prompt in ([3, 4, 5], [9], list(range(20, 60))):
        answer = client.completions.create(model="adapter", prompt=prompt, max_tokens=12, extra_body=GREEDY)
        tokens: list[int] = answer.choices[0].token_ids  # type: ignore[attr-defined]
        expected = steered_logprobs(reference, prompt, tokens)[:-1]
        assert tokens == expected.argmax(dim=-1).tolist()
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.token_logprobs == pytest.approx(expected.max(dim=-1).values.tolist(), abs=1e-4)
        plain = blenderbot_logprobs(tiny_blenderbot(seed=SEED), prompt, tokens)[:-1].argmax(dim=-1).tolist()
        num_flipped += sum(a != b for a, b in zip(tokens, plain, strict=True))
    assert num_flipped > 0, "steering that changes nothing shows nothing"


def test_the_base_itself_is_served_and_streams(client: openai.OpenAI) -> None:
    chunks = client.completions.create(model="base", prompt=PROMPT, max_tokens=9, stream=True, extra_body=GREEDY)
    tokens = [token for chunk in chunks for choice in chunk.choices for token in choice.token_ids]  # type: ignore[attr-defined]
    expected = blenderbot_logprobs(tiny_blenderbot(seed=SEED), PROMPT, tokens)[:-1]
    assert tokens == expected.argmax(dim=-1).tolist()


def test_best_of_and_pieces_work_as_with_any_engine(client: openai.OpenAI) -> None:
    """Greedy pieces put together are the greedy answer: the encoder reads the prompt alone each time."""
    whole = client.completions.create(model="adapter", prompt=PROMPT, max_tokens=12, extra_body=GREEDY)
    blocks = {**BLOCKWISE, "best_of": 2, "reward": "sevens"}
    pieces = client.completions.create(model="adapter", prompt=PROMPT, max_tokens=12, extra_body={**GREEDY, **blocks})
    assert pieces.choices[0].token_ids == whole.choices[0].token_ids  # type: ignore[attr-defined]
    best = client.completions.create(model="adapter", prompt=PROMPT, max_tokens=8, n=2, best_of=4, seed=1)
    assert len(best.choices) == 2
    assert best.usage is not None
    assert best.usage.completion_tokens > 8


def test_what_does_not_fit_or_cannot_be_done_is_openais_400(client: openai.OpenAI) -> None:
    for arguments, message in (
        ({"prompt": [3] * 49, "max_tokens": 1}, "48 of them for the prompt"),
        ({"prompt": PROMPT, "max_tokens": 49}, "maximum context length"),
        ({"prompt": PROMPT, "extra_body": {"repetition_penalty": 1.5}}, "repetition_penalty"),
        (
            {"prompt": PROMPT, "max_tokens": 60, "best_of": 2, "extra_body": {**BLOCKWISE, "reward": "sevens"}},
            "48 of them for the answer",
        ),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            client.completions.create(model="adapter", **arguments)


def test_an_adapter_is_trained_against_it_through_the_gateway_and_served(
    gateway: RunningGateway, base_dir: Path, tmp_path: Path
) -> None:
    """Rounds are drawn by the gateway under versions that are swapped in; the last one takes a route."""
    write_llama(tmp_path / "small", seed=7, num_layers=1, width=32)
    write_tokenizer(tmp_path / "small")
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "t{i} t{i + 1} t{i + 2}"}}\n' for i in range(10, 50)))
    config = parse_config(
        {
            "output_dir": str(tmp_path / "run"),
            "gateway": {"url": gateway.url},
            "models": {"base_model": str(base_dir), "adapter": str(tmp_path / "small")},
            "reward": {"name": "sevens", "source": "gateway"},
            "prompts": {"type": "file", "path": str(tmp_path / "prompts.jsonl")},
            "publish": {"name": "seven", "route": "seven", "require_gate": False},
            "logged": {"enabled": False},
            "objective": {"kind": "rloo", "kl_coef": 0.01},
            "fresh": {"source": "gateway", "model": "base", "prompts_per_round": 12, "num_per_prompt": 4},
            "sampling": {"max_tokens": 4},
            "optimiser": {"batch_size": 48, "lr": 3e-2, "decay": "none"},
            "evaluation": {"share": 0.25, "num_resamples": 100, "num_per_prompt": 2},
            "report": {"plots": False},
            "steps": 8,
            "num_threads": 1,
        }
    )
    with GatewayClient(gateway.url) as connection:
        result = train(config, gateway=connection, show_progress=False)
    assert result.activated_route == "seven"
    assert result.evaluation["steered"]["mean_reward"] > result.evaluation["base"]["mean_reward"] + 0.2
    with gateway.client() as http:
        body = {"model": "seven", "prompt": "t11 t12 t13", "max_tokens": 6, "seed": 1}
        answer = http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        versions = http.get("/admin/adapters").json()["data"]
        temporary = [version for version in versions if version["name"] == "seven.training"]
        assert len(temporary) >= 8
        assert all(version["retired_at"] is not None for version in temporary)


@pytest.mark.engine
def test_a_causal_base_answers_as_in_vllm(
    engine_url: str, tiny_models: TinyModels, reference: TwoModelReference, tmp_path: Path
) -> None:
    """The same model, adapter and formula in both engines."""
    kinds = (("--engine-kind", "transformers", "--model", str(tiny_models.base)), ("--engine-url", engine_url))
    prompts = random_prompts(41, 6)
    answers = []
    for number, kind in enumerate(kinds):
        arguments = (*kind, "--adapter", f"adapter={tiny_models.adapter}")
        with running_gateway(tmp_path / f"gateway-{number}", *arguments) as started:
            answers.append(asyncio.run(_greedy(started.url, prompts)))
    assert answers[0] == answers[1]
    for prompt, tokens in zip(prompts, answers[0], strict=True):
        _, steered, _ = reference.run(prompt, [("adapter", 1.0)], tokens)
        assert tokens == steered.argmax(dim=-1)[:-1].tolist()


async def _greedy(url: str, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as client:

        async def ask(prompt: Sequence[int]) -> list[int]:
            body = {"model": "adapter", "prompt": list(prompt), "max_tokens": 16, **GREEDY}
            response = await client.post("/v1/completions", json=body)
            assert response.status_code == 200, response.text
            tokens: list[int] = response.json()["choices"][0]["token_ids"]
            return tokens

        return list(await asyncio.gather(*(ask(prompt) for prompt in prompts)))
