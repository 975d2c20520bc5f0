"""A whole gateway over a black box: storage, routes, the API's shapes, what is billed, health and metrics."""

import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from fake_gateway import serving
from fake_provider import FakeProvider, bigram_logprobs, refusal
from scripted_server import scripted_server
from tiny_models import TinyModels
from trimtab_adapters.contract.errors import InvalidRequestError, VocabularyError
from trimtab_adapters.contract.records import Rollout
from trimtab_server.app import create_app
from trimtab_server.serve import build_parts
from trimtab_server.settings import Settings

pytestmark = pytest.mark.anyio

KEY = "sk-very-secret"


@dataclass
class World:
    fake: FakeProvider
    client: httpx.AsyncClient
    url: str


def settings_for(url: str, tiny_models: TinyModels, data_dir: Path, **more: Any) -> Settings:
    return Settings(
        data_dir=data_dir,
        black_box_url=f"{url}/v1",
        black_box_model="big-model",
        black_box_tokenizer=str(tiny_models.base),
        black_box_context=64,
        black_box_max_retries=0,
        adapter_kv_bytes=16 << 20,
        **more,
    )


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def world(
    anyio_backend: str, tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[World]:
    fake = FakeProvider()
    async with scripted_server(fake.over_http) as server:
        settings = settings_for(
            server.url,
            tiny_models,
            tmp_path_factory.mktemp("black-box"),
            black_box_api_key=KEY,
            served_model_name="base",
            adapters={"adapter": tiny_models.adapter},
        )
        async with (
            serving(create_app(await build_parts(settings))) as url,
            httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client,
        ):
            yield World(fake, client, url)


async def complete(world: World, **body: Any) -> Any:
    response = await world.client.post(
        "/v1/completions", json={"model": "adapter", "prompt": "t3 t4 t5", "max_tokens": 4, "temperature": 0} | body
    )
    assert response.status_code == 200, response.text
    return response.json()


async def test_completions_have_openais_shapes(world: World) -> None:
    asked: dict[str, Any] = {"model": "adapter", "prompt": "t3 t4 t5", "max_tokens": 4, "temperature": 0}
    async with openai.AsyncOpenAI(base_url=f"{world.url}/v1", api_key="any", max_retries=0) as client:
        whole = await client.completions.create(**asked, logprobs=2)
        stream = await client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
        with pytest.raises(openai.BadRequestError, match="chat template"):
            await client.chat.completions.create(model="adapter", messages=[{"role": "user", "content": "t3"}])
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (3, 4)
    assert whole.choices[0].logprobs is not None
    assert [len(top) for top in whole.choices[0].logprobs.top_logprobs or []] == [2, 2, 2, 2]
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert sum(bool(chunk.choices and chunk.choices[0].text) for chunk in chunks) == 4
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.model_dump()["black_box"]["completion_tokens"] >= 3


async def test_rollouts_are_logged_with_all_three_log_probabilities(world: World) -> None:
    answer = await complete(world, prompt="t9 t8 t7", user="rollouts", ignore_eos=True)
    lines = (await world.client.get("/admin/rollouts/export", params={"format": "jsonl"})).text.splitlines()
    (rollout,) = [r for r in map(json.loads, lines) if r["metadata"].get("user") == "rollouts"]
    assert rollout["output_text"] == answer["choices"][0]["text"]
    names = ("base_logprobs", "steered_logprobs", "kl")
    assert {len(rollout[name]) for name in names} == {len(rollout["adapter_logprobs"][0])} == {4}
    assert rollout["base_model"] == "base"
    assert rollout["sampling"]["black_box"] == {"unseen": "exclude", "top_logprobs": 20}
    assert not Rollout.model_validate(rollout).is_plain, "it was not sampled from the whole vocabulary"
    await complete(world, model="base", user="whole")
    lines = (await world.client.get("/admin/rollouts/export", params={"format": "jsonl"})).text.splitlines()
    (rollout,) = [r for r in map(json.loads, lines) if r["metadata"].get("user") == "whole"]
    assert Rollout.model_validate(rollout).is_plain


async def test_reference_rollouts_and_candidates_are_billed_together(world: World) -> None:
    await world.client.post("/admin/rewards", json={"name": "ones", "kind": "regex", "target": "t1"})
    answer = await complete(world, prompt=[11, 12], best_of=3, reward="ones", temperature=1, calibration={"size": 2})
    usage = answer["usage"]
    assert usage["reference_tokens"] > 0
    # Each token of 3 candidates, whose first call is one for all, and one call for the 2 references.
    assert usage["black_box"]["calls"] == 1 + (usage["completion_tokens"] - 3) + 1


async def test_an_answer_in_pieces_is_billed_whole(world: World) -> None:
    """2 blocks of 2 tokens, each the best of 2: 4 tokens a block, of which a block's first calls are one."""
    before = len(world.fake.bodies)
    answer = await complete(
        world,
        prompt=[21, 22],
        best_of=2,
        reward="ones",
        ignore_eos=True,
        calibration={"method": "none"},
        selection={"strategy": "blockwise", "block_tokens": 2},
    )
    billed = answer["usage"]["black_box"]
    assert billed["calls"] == len(world.fake.bodies) - before == 6
    assert billed["prompt_tokens"] == sum(len(body["prompt"]) for body in world.fake.bodies[before:])


async def test_an_unsteered_model_is_one_call_of_the_base(world: World) -> None:
    before = len(world.fake.bodies)
    answer = await complete(world, model="base")
    assert len(world.fake.bodies) == before + 1
    assert answer["choices"][0]["text"].split()[0] == f"t{int(bigram_logprobs(5).argmax())}"


async def test_early_rejection_works_and_is_billed_whole(world: World) -> None:
    before = len(world.fake.bodies)
    answer = await complete(
        world,
        prompt=[23, 24],
        best_of=3,
        seed=5,
        temperature=1,
        reward="ones",
        ignore_eos=True,
        calibration={"method": "none"},
        selection={"strategy": "early_reject", "checkpoints": [2], "return_candidates": True},
    )
    assert answer["usage"]["black_box"]["calls"] == len(world.fake.bodies) - before
    assert len(answer["candidates"]) == 3


@pytest.mark.parametrize(
    ("reply", "status", "code"), [(refusal(400, "too long"), 400, None), (refusal(429), 503, "engine_unavailable")]
)
async def test_a_provider_that_fails_is_an_error_of_openais_shape(
    world: World, reply: Any, status: int, code: str | None
) -> None:
    world.fake.replies.append(reply)
    response = await world.client.post(
        "/v1/completions", json={"model": "adapter", "prompt": [31, status % 128], "max_tokens": 2}
    )
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert ("Retry-After" in response.headers) == (status == 503)


@pytest.mark.parametrize("model", ["base", "adapter"])
async def test_an_error_before_the_first_token_of_a_stream_has_its_status(world: World, model: str) -> None:
    world.fake.replies.append(refusal(400, "too long"))
    body = {"model": model, "prompt": [33, 34], "max_tokens": 2, "stream": True}
    response = await world.client.post("/v1/completions", json=body)
    assert (response.status_code, response.json()["error"]["message"]) == (400, "too long")


async def test_a_negative_prompt_is_refused(world: World) -> None:
    response = await world.client.post(
        "/v1/completions",
        json={"model": "adapter", "prompt": "t3", "steering": {"negative_prompt": "t4"}, "max_tokens": 2},
    )
    assert (response.status_code, response.json()["error"]["code"]) == (400, "unsupported_parameter")


async def test_health_metrics_and_the_list_of_engines_tell_of_the_provider(world: World) -> None:
    await complete(world)
    assert (await world.client.get("/ready")).status_code == 200
    assert (await world.client.get("/version")).json()["vllm_version"] is None
    (engine,) = (await world.client.get("/admin/engines")).json()["data"]
    assert engine["status"]["provider"]["calls"] > 0
    assert engine["status"]["model"] == "big-model at 127.0.0.1"
    await world.client.get("/ready")
    metrics = (await world.client.get("/metrics")).text
    assert "trimtab:black_box_calls_total" in metrics
    assert "trimtab:black_box_breaker_open 0.0" in metrics
    assert KEY not in metrics + json.dumps(engine)
    assert world.fake.headers


async def test_a_tokenizer_that_is_none_stops_the_start(tiny_models: TinyModels, tmp_path: Path) -> None:
    settings = settings_for("http://127.0.0.1:9", tiny_models, tmp_path / "data")
    with pytest.raises(VocabularyError):
        await build_parts(settings.model_copy(update={"black_box_tokenizer": str(tmp_path)}))


async def test_without_torch_the_start_says_what_is_missing(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trimtab_adapters.in_process.stepper", None)
    with pytest.raises(InvalidRequestError, match="not installed here"):
        await build_parts(settings_for("http://127.0.0.1:9", tiny_models, tmp_path / "data"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"black_box_model": None}, "black_box_model"),
        ({"black_box_tokenizer": None}, "black_box_tokenizer"),
        ({"black_box_url": "ftp://host/v1"}, "http"),
        ({"black_box_url": "https://user:word@host/v1"}, "TRIMTAB_BLACK_BOX_API_KEY"),
        ({"black_box_url": "https://host/v1?key=1"}, "TRIMTAB_BLACK_BOX_API_KEY"),
        ({"model": "m"}, "takes the place of an engine"),
        ({"engine_urls": ("http://host",)}, "takes the place of an engine"),
        ({"engine_args": ("--x",)}, "takes the place of an engine"),
        ({"black_box_unseen": "guess"}, "exclude"),
        ({"black_box_logprobs": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes: dict[str, Any], message: str) -> None:
    whole: dict[str, Any] = {
        "black_box_url": "https://host/v1",
        "black_box_model": "big",
        "black_box_tokenizer": "/tokenizer",
    }
    assert Settings(**whole).base_model == "big"
    with pytest.raises(ValueError, match=message):
        Settings(**(whole | changes))


def test_the_key_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_BLACK_BOX_API_KEY", KEY)
    assert KEY not in repr(Settings())
    assert Settings().black_box_api_key is not None
