"""Operators, negative prompts and explanations through the official client, the real gateway and a real engine."""

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from gateway_process import RunningGateway
from tiny_models import TinyModels

pytestmark = pytest.mark.engine

PROMPT = "t5 t9 t33 t70 t2"
FIELDS: dict[str, Any] = {"model": "adapter", "prompt": PROMPT, "max_tokens": 16, "temperature": 0}


@pytest.fixture(scope="module")
def client(gateway: RunningGateway) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def complete(client: OpenAI, steering: dict[str, Any], **fields: Any) -> Any:
    body = {"steering": steering, "return_token_ids": True, "steering_logprobs": True}
    return client.completions.create(**(FIELDS | fields), extra_body=body)


def extra(choice: Any, name: str) -> Any:
    return choice.model_extra[name]


def test_an_explanation_agrees_with_the_recorded_logprobs(client: OpenAI, tiny_models: TinyModels) -> None:
    (choice,) = complete(client, {"explain": 3}).choices
    told, recorded = extra(choice, "explain")["tokens"], extra(choice, "steering_logprobs")
    assert [token["token_id"] for token in told] == extra(choice, "token_ids") == recorded["token_ids"]
    for number, token in enumerate(told):
        assert token["token"].strip() == f"t{token['token_id']}"
        assert (token["base"], token["steered"]) == (recorded["base"][number], recorded["steered"][number])
        assert (token["kl"], token["flipped"]) == (recorded["kl"][number], recorded["flipped"][number])
        (adapter,) = token["adapters"]
        assert adapter["version"] == tiny_models.manifest("adapter").version_id
        assert adapter["logprob"] == recorded["adapter"][0][number]
        assert [len(token["before"]), len(token["after"])] == [3, 3]
        assert token["after"][0]["token_id"] == token["token_id"], "greedy decoding takes the most probable token"
        assert token["after"][0]["steered"] == pytest.approx(token["steered"], abs=1e-5)
        assert token["flipped"] == (token["before"][0]["token_id"] != token["after"][0]["token_id"])


def test_a_stream_explains_the_tokens_of_each_chunk(client: OpenAI) -> None:
    (whole,) = complete(client, {"explain": 2}).choices
    body = {"steering": {"explain": 2}, "return_token_ids": True}
    pieces: list[Any] = []
    for chunk in client.completions.create(**FIELDS, stream=True, extra_body=body):
        for choice in chunk.choices:
            ids = (choice.model_extra or {}).get("token_ids") or []
            told = ((choice.model_extra or {}).get("explain") or {"tokens": []})["tokens"]
            assert [token["token_id"] for token in told] == ids
            pieces += told
    want = extra(whole, "explain")["tokens"]
    assert [piece["token_id"] for piece in pieces] == [token["token_id"] for token in want]
    for piece, token in zip(pieces, want, strict=True):
        assert piece["steered"] == pytest.approx(token["steered"], abs=1e-4)
        assert [entry["token_id"] for entry in piece["after"]] == [entry["token_id"] for entry in token["after"]]


def test_a_negative_prompt_as_text_is_the_same_as_its_ids(client: OpenAI) -> None:
    text, ids = "t7 t90 t14 t14 t3", [7, 90, 14, 14, 3]
    guided = [
        complete(client, {"adapters": [], "negative_prompt": prompt, "guidance_scale": 2.5}, model="base")
        for prompt in (text, ids)
    ]
    plain = complete(client, {"adapters": []}, model="base")
    first, second = (extra(answer.choices[0], "token_ids") for answer in guided)
    assert first == second != extra(plain.choices[0], "token_ids")
    assert any(kl > 0 for kl in extra(guided[0].choices[0], "steering_logprobs")["kl"])


def test_operators_hold_through_the_gateway(client: OpenAI) -> None:
    first = complete(client, {"schedule": {"first": 2}}).choices[0]
    kl = extra(first, "steering_logprobs")["kl"]
    assert [value == 0 for value in kl] == [False, False] + [True] * (len(kl) - 2)
    capped = complete(client, {"max_kl": 0.02}).choices[0]
    free = complete(client, {}).choices[0]
    assert max(extra(capped, "steering_logprobs")["kl"]) <= 0.02 * 1.001
    assert max(extra(free, "steering_logprobs")["kl"]) > 0.02, "else the cap had nothing to do"


@pytest.mark.parametrize(
    ("steering", "param"),
    [
        ({"plausibility": 2}, "steering.plausibility"),
        ({"max_kl": 0}, "steering.max_kl"),
        ({"guidance_scale": 2.0}, "steering.guidance_scale"),
        ({"negative_prompt": [{"role": "user", "content": "t1"}]}, "steering.negative_prompt"),
        ({"negative_prompt": [1] * 5000}, "steering.negative_prompt"),
        ({"negative_prompt": [4_000_000]}, "steering.negative_prompt"),
    ],
)
def test_bad_operators_are_the_callers_fault(client: OpenAI, steering: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, steering)
    assert caught.value.param == param


def test_metrics_tell_versions_apart(client: OpenAI, gateway: RunningGateway, tiny_models: TinyModels) -> None:
    complete(client, {})
    version = tiny_models.manifest("adapter").version_id
    text = httpx.get(f"{gateway.url}/metrics", trust_env=False).text
    for name in ("adapter_steps_total", "adapter_step_seconds_total", "adapter_kl_nats_count", "adapter_cache_bytes"):
        lines = [line for line in text.splitlines() if line.startswith(f"trimtab:{name}{{") and version in line]
        assert lines, name
        assert sum(float(line.rsplit(" ", 1)[1]) for line in lines) > 0, name
