"""Everything that the API offers, through the official client, the real gateway and a real engine."""

import contextlib
import json
import time
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


@pytest.fixture(scope="module")
def client(gateway: RunningGateway) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def tokens(choice: Any) -> list[int]:
    return list(choice.model_extra["token_ids"])


def steering(*adapters: dict[str, Any]) -> dict[str, Any]:
    return {"steering": {"adapters": list(adapters)}, "return_token_ids": True}


def test_models_list_base_and_routes(client: OpenAI, tiny_models: TinyModels) -> None:
    models = {model.id: model for model in client.models.list()}
    assert {"base", "adapter", "other"} <= set(models)
    route = client.models.retrieve("adapter")
    assert route.model_extra is not None
    assert route.model_extra["parent"] == "base"
    (term,) = route.model_extra["steering"]["adapters"]
    assert term == {"name": "adapter", "version": tiny_models.manifest("adapter").version_id, "alpha": 1.0}


def test_a_route_and_the_same_steering_in_the_body_give_the_same_tokens(
    client: OpenAI, tiny_models: TinyModels
) -> None:
    fields: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 20, "temperature": 0}
    base = client.completions.create(model="base", extra_body={"return_token_ids": True}, **fields)
    route = client.completions.create(model="adapter", extra_body={"return_token_ids": True}, **fields)
    version = tiny_models.manifest("adapter").version_id
    body = client.completions.create(
        model="base", extra_body=steering({"name": "adapter", "version": version, "alpha": 1.0}), **fields
    )
    assert tokens(route.choices[0]) == tokens(body.choices[0]) != tokens(base.choices[0])
    assert route.model_extra is not None
    assert route.model_extra["steering"]["adapters"][0]["version"] == version
    assert base.usage is not None
    assert (base.usage.prompt_tokens, base.usage.completion_tokens) == (5, len(tokens(base.choices[0])))


@pytest.mark.parametrize("model", ["base", "adapter"])
def test_eight_choices_are_eight_requests_with_seeds_in_a_row(client: OpenAI, model: str) -> None:
    """Also where the eight are one request to the engine, as unsteered ones are."""
    fields: dict[str, Any] = {
        "model": model,
        "prompt": PROMPT,
        "max_tokens": 16,
        "temperature": 0.9,
        "extra_body": {"return_token_ids": True, "ignore_eos": True},
    }
    together = client.completions.create(n=8, seed=100, **fields)
    alone = [client.completions.create(seed=100 + i, **fields).choices[0] for i in range(8)]
    assert [choice.index for choice in together.choices] == list(range(8))
    assert [tokens(choice) for choice in together.choices] == [tokens(choice) for choice in alone]
    assert len({tuple(tokens(choice)) for choice in alone}) > 4


def test_the_stream_is_the_answer_in_pieces(client: OpenAI) -> None:
    fields: dict[str, Any] = {
        "model": "adapter",
        "prompt": [PROMPT, "t1 t2"],
        "n": 2,
        "max_tokens": 12,
        "seed": 3,
        "logprobs": 2,
    }
    whole = client.completions.create(**fields)
    pieces: dict[int, str] = {}
    logprobs: dict[int, list[float | None]] = {}
    finish: dict[int, str | None] = {}
    usage = None
    for chunk in client.completions.create(stream=True, stream_options={"include_usage": True}, **fields):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            pieces[choice.index] = pieces.get(choice.index, "") + choice.text
            if choice.logprobs is not None:
                logprobs.setdefault(choice.index, []).extend(choice.logprobs.token_logprobs or [])
            finish[choice.index] = choice.finish_reason or finish.get(choice.index)
    assert pieces == {choice.index: choice.text for choice in whole.choices}
    assert finish == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage == whole.usage
    for choice in whole.choices:
        assert choice.logprobs is not None
        assert logprobs[choice.index] == pytest.approx(choice.logprobs.token_logprobs, abs=1e-4)


def test_logprobs_are_steered_and_echo_gives_the_prompt_back(client: OpenAI) -> None:
    fields: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0, "logprobs": 3}
    answer = client.completions.create(
        model="adapter", extra_body={"steering_logprobs": True, "return_token_ids": True}, **fields
    )
    choice = answer.choices[0]
    assert choice.logprobs is not None
    assert choice.model_extra is not None
    record = choice.model_extra["steering_logprobs"]
    assert choice.logprobs.token_logprobs == pytest.approx(record["steered"], abs=1e-4)
    assert record["base"] != pytest.approx(record["steered"], abs=1e-2)
    for steered, base, adapter, kl in zip(
        record["steered"], record["base"], record["adapter"][0], record["kl"], strict=True
    ):
        assert max(steered, base, adapter) <= 0.0 <= kl
    echoed = client.completions.create(model="adapter", echo=True, **fields)
    assert echoed.choices[0].text == PROMPT + choice.text or echoed.choices[0].text.endswith(choice.text)
    assert echoed.choices[0].logprobs is not None
    assert echoed.choices[0].logprobs.token_logprobs is not None
    assert len(echoed.choices[0].logprobs.token_logprobs) == 5 + len(tokens(choice))


def test_chat_uses_the_engines_template_and_is_steered(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": PROMPT}]
    fields: dict[str, Any] = {"messages": messages, "max_tokens": 12, "temperature": 0}
    base = client.chat.completions.create(model="base", **fields)
    steered = client.chat.completions.create(model="adapter", n=2, logprobs=True, top_logprobs=2, **fields)
    assert base.choices[0].message.role == "assistant"
    assert base.choices[0].message.content != steered.choices[0].message.content
    assert steered.choices[0].message.content == steered.choices[1].message.content
    assert steered.choices[0].logprobs is not None
    streamed = ""
    for chunk in client.chat.completions.create(model="adapter", stream=True, **fields):
        streamed += chunk.choices[0].delta.content or ""
    assert streamed == steered.choices[0].message.content


@pytest.fixture(scope="module")
def reward(gateway: RunningGateway, tiny_models: TinyModels) -> str:
    """A registered reward: the logit of the classifier's last label, read from the output alone."""
    spec = {"name": "tiny", "kind": "hf_classifier", "target": str(tiny_models.classifier)}
    with gateway.client() as http:
        http.post("/admin/rewards", json=spec).raise_for_status()
    return "tiny"


def score(tiny_models: TinyModels, text: str) -> float:
    """The reward by transformers alone."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_models.classifier)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_models.classifier, dtype=torch.float32)
    with torch.inference_mode():
        return float(model(**tokenizer(text, return_tensors="pt")).logits[0, -1])


def test_best_of_ranks_by_calibrated_reward_and_counts_every_candidate(
    client: OpenAI, reward: str, tiny_models: TinyModels
) -> None:
    body = {"reward": reward, "calibration": {"size": 8}, "ignore_eos": True}
    answer = client.completions.create(
        model="adapter", prompt=PROMPT, max_tokens=8, n=2, best_of=6, seed=1, extra_body=body
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6 * 8
    selections = [(choice.model_extra or {})["selection"] for choice in answer.choices]
    for rank, (choice, selection) in enumerate(zip(answer.choices, selections, strict=True)):
        assert (selection["rank"], selection["num_candidates"]) == (rank, 6)
        assert selection["reward"]["raw"] == pytest.approx(score(tiny_models, choice.text), abs=1e-5)
        assert selection["reward"]["calibrated"] * 16 == pytest.approx(round(selection["reward"]["calibrated"] * 16))
        assert selection["reward"]["calibration_size"] == 8
    everything = client.completions.create(
        model="adapter", prompt=PROMPT, max_tokens=8, n=6, seed=1, extra_body={"ignore_eos": True}
    )
    best = max(score(tiny_models, choice.text) for choice in everything.choices)
    assert selections[0]["reward"]["raw"] == pytest.approx(best, abs=1e-5)


def test_without_a_reward_best_of_ranks_by_mean_logprob(client: OpenAI) -> None:
    fields: dict[str, Any] = {"model": "base", "prompt": PROMPT, "max_tokens": 8, "seed": 11}
    best = client.completions.create(best_of=5, **fields)
    all_five = client.completions.create(n=5, logprobs=0, **fields)
    means = {}
    for choice in all_five.choices:
        assert choice.logprobs is not None
        values = [value for value in choice.logprobs.token_logprobs or [] if value is not None]
        means[choice.text] = sum(values) / len(values)
    assert best.choices[0].text == max(means, key=lambda text: means[text])


ERRORS: list[tuple[dict[str, Any], type[openai.APIStatusError], str]] = [
    ({"model": "nobody"}, openai.NotFoundError, "nobody"),
    ({"steering": {"adapters": [{"name": "ghost"}]}}, openai.NotFoundError, "ghost"),
    ({"steering": {"adapters": [{"name": "adapter", "version": "0" * 16}]}}, openai.NotFoundError, "0" * 16),
    ({"steering": {"adapters": [{"name": "adapter", "alpha": 1000}]}}, openai.BadRequestError, "alpha"),
    ({"steering": {"adapters": [{"name": "adapter", "alpha": "much"}]}}, openai.BadRequestError, "alpha"),
    ({"steering": "adapter"}, openai.BadRequestError, "steering"),
    ({"max_tokens": 100_000}, openai.BadRequestError, "max_tokens"),
    ({"prompt": "t1 " * 300}, openai.BadRequestError, "256"),
    ({"prompt": {"text": "t1"}}, openai.BadRequestError, "prompt"),
    ({"temperature": "hot"}, openai.BadRequestError, "temperature"),
    ({"n": 4, "best_of": 2}, openai.BadRequestError, "best_of"),
    ({"best_of": 3, "stream": True}, openai.BadRequestError, "streamed"),
    ({"reward": "nothing"}, openai.NotFoundError, "nothing"),
    ({"colour": "red"}, openai.BadRequestError, "colour"),
    ({"prompt": [1, 2, 999_999]}, openai.BadRequestError, "vocab"),
]


@pytest.mark.parametrize(("fields", "error", "word"), ERRORS, ids=[str(fields)[:40] for fields, _, _ in ERRORS])
def test_bad_requests_get_openai_errors_that_name_the_fault(
    client: OpenAI, fields: dict[str, Any], error: type[openai.APIStatusError], word: str
) -> None:
    body = {"model": "base", "prompt": "t1 t2", "max_tokens": 4} | fields
    stream = bool(body.pop("stream", False))
    known = {name: body.pop(name) for name in ("model", "prompt")}
    with pytest.raises(error) as caught:
        client.post("/completions", body=known | body | {"stream": stream}, cast_to=object)
    assert word in caught.value.message
    assert isinstance(caught.value.body, dict)
    assert set(caught.value.body) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "content", [b"{", b'{"model": "base", "prompt": "t1", "temperature": NaN}', b"[]", b'"x"', b"\xff\xfe"]
)
def test_malformed_json_is_a_400(gateway: RunningGateway, content: bytes) -> None:
    with gateway.client() as http:
        answer = http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def running_requests(engine_url: str) -> float:
    text = httpx.get(f"{engine_url}/metrics", trust_env=False).text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("vllm:num_requests_running{"))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_stops_the_engines_work(
    gateway: RunningGateway, client: OpenAI, engine_url: str, stream: bool
) -> None:
    fields: dict[str, Any] = {"model": "adapter", "prompt": "t1 t2", "max_tokens": 250, "n": 4}
    body = {"ignore_eos": True}
    if stream:
        chunks = client.completions.create(stream=True, extra_body=body, **fields)
        next(iter(chunks))
        chunks.close()
    else:
        with contextlib.suppress(openai.APITimeoutError):
            client.with_options(timeout=0.2).completions.create(extra_body=body, **fields)
    deadline = time.monotonic() + 30
    while running_requests(engine_url) > 0:
        assert time.monotonic() < deadline, "the engine goes on for a client that has left"
        time.sleep(0.05)


def test_request_ids_and_metrics(gateway: RunningGateway, client: OpenAI) -> None:
    answer = client.completions.with_raw_response.create(
        model="adapter", prompt="t1", max_tokens=3, extra_headers={"x-request-id": "mine-1"}
    )
    assert answer.headers["x-request-id"] == "mine-1"
    assert "adapter" in answer.headers["x-trimtab-steering"]
    with gateway.client() as http:
        text = http.get("/metrics").text
        assert http.get("/health").json() == {"status": "ok"}
        assert http.get("/ready").status_code == 200
    for name in (
        "prompt_tokens_total",
        "generation_tokens_total",
        "num_requests_running",
        "e2e_request_latency_seconds",
        "time_to_first_token_seconds",
    ):
        assert f"trimtab:{name}" in text, name


def test_every_candidate_is_in_the_log(gateway: RunningGateway, client: OpenAI) -> None:
    answer = client.completions.with_raw_response.create(
        model="adapter",
        prompt=PROMPT,
        max_tokens=5,
        n=1,
        best_of=3,
        temperature=0.7,
        seed=4,
        extra_headers={"x-request-id": "logged-1"},
    )
    text = answer.parse().choices[0].text
    with gateway.client() as http:
        lines = http.get("/admin/rollouts/export", params={"format": "jsonl"}).text.splitlines()
    rollouts = [rollout for rollout in map(json.loads, lines) if rollout["metadata"].get("x_request_id") == "logged-1"]
    assert len(rollouts) == 3
    assert [rollout["output_text"] for rollout in rollouts if rollout["chosen"]] == [text]
    for rollout in rollouts:
        count = len(rollout["output_token_ids"])
        assert len(rollout["base_logprobs"]) == len(rollout["steered_logprobs"]) == len(rollout["kl"]) == count > 0
        assert len(rollout["adapter_logprobs"][0]) == count
        assert rollout["sampling"]["temperature"] == 0.7
        assert rollout["prompt_token_ids"] == [5, 9, 33, 70, 2]
