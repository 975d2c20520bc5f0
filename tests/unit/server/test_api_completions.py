from typing import Any

import httpx
import pytest
from typing_extensions import override

from fake_gateway import KIND, FakeGateway, asgi_client, build_gateway
from trimtab_server.engine import fake_model
from trimtab_server.engine.base import EngineRequest
from trimtab_server.engine.fake import FakeEngine

pytestmark = pytest.mark.anyio


async def complete(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post("/v1/completions", json={"model": "base", "prompt": "Hi", **body})
    assert response.status_code == 200, response.text
    data: dict[str, Any] = response.json()
    return data


def sent(gateway: FakeGateway) -> list[EngineRequest]:
    return gateway.engine.observed.requests


async def test_answer_has_openai_shape_and_nothing_the_caller_did_not_ask_for(client: httpx.AsyncClient) -> None:
    data = await complete(client, max_tokens=3)
    assert data["id"].startswith("cmpl-")
    assert data["object"] == "text_completion"
    assert data["model"] == "base"
    assert set(data) == {"id", "object", "created", "model", "choices", "usage"}
    (choice,) = data["choices"]
    assert set(choice) == {"index", "text", "logprobs", "finish_reason", "stop_reason"}
    assert choice["logprobs"] is None
    assert choice["finish_reason"] == "length"
    assert len(choice["text"].split()) == 3
    assert data["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}


async def test_max_tokens_is_16_when_absent_or_null(client: httpx.AsyncClient) -> None:
    assert (await complete(client))["usage"]["completion_tokens"] == 16
    assert (await complete(client, max_tokens=None))["usage"]["completion_tokens"] == 16


async def test_null_for_every_optional_field_is_its_default(client: httpx.AsyncClient, gateway: FakeGateway) -> None:
    names = [
        *("best_of", "echo", "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "n", "presence_penalty"),
        *("seed", "stop", "stream", "stream_options", "suffix", "temperature", "top_p", "user", "steering", "reward"),
        *("steering_logprobs", "calibration", "top_k", "min_p", "ignore_eos", "prompt_embeds", "vllm_xargs"),
        *("kv_transfer_params", "mm_payload", "request_id", "response_format", "use_beam_search", "return_token_ids"),
    ]
    await complete(client, **dict.fromkeys(names))
    (request,) = sent(gateway)
    assert request.body == {"prompt": "Hi", "max_tokens": 16, "logprobs": 0, "return_token_ids": True}
    assert request.steering is None


@pytest.mark.parametrize(
    ("prompt", "num_prompts"),
    [("Hi", 1), (["Hi", "Yo"], 2), ([72, 105], 1), ([[72, 105], [89, 111]], 2), (["Hi"], 1)],
)
async def test_all_forms_of_prompt(
    client: httpx.AsyncClient, gateway: FakeGateway, prompt: Any, num_prompts: int
) -> None:
    data = await complete(client, prompt=prompt, max_tokens=1, temperature=0)
    assert [choice["index"] for choice in data["choices"]] == list(range(num_prompts))
    assert data["usage"]["prompt_tokens"] == 2 * num_prompts
    # "Hi" is the bytes 72 105: the same prompt, so the same text
    assert data["choices"][0]["text"] == (await complete(client, max_tokens=1, temperature=0))["choices"][0]["text"]


async def test_sampling_fields_reach_the_engine_as_they_are(client: httpx.AsyncClient, gateway: FakeGateway) -> None:
    fields: dict[str, Any] = {
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
        "logit_bias": {"260": -100},
        "temperature": 0.7,
        "top_p": 0.9,
        "stop": ["\n", "END"],
        "suffix": "tail",
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "stop_token_ids": [3],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "min_tokens": 1,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "truncate_prompt_tokens": 5,
        "truncation_side": "left",
        "allowed_token_ids": [256, 257],
        "bad_words": ["no"],
        "add_special_tokens": False,
        "response_format": {"type": "json_object"},
        "structured_outputs": {"regex": "a+"},
        "priority": 1,
        "session_id": "s",
        "return_tokens_as_token_ids": True,
        "cache_salt": "salt",
        "vllm_xargs": {"other": [1, "two"]},
        "repetition_detection": {"max_pattern_size": 4},
        "thinking_token_budget": 5,
        "watermarking": False,
        "routed_experts_prompt_start": 1,
        "logprobs": 2,
        "logprob_token_ids": [256],
        "prompt_logprobs": 1,
    }
    await complete(client, **fields)
    body = sent(gateway)[0].body
    assert {key: body[key] for key in fields} == fields


async def test_a_single_stop_string_becomes_a_list_and_ends_the_text(client: httpx.AsyncClient) -> None:
    whole = (await complete(client, max_tokens=4, seed=1))["choices"][0]["text"]
    second = whole.split()[1]
    (choice,) = (await complete(client, max_tokens=4, seed=1, stop=second))["choices"]
    assert choice["text"] == whole[: whole.index(second)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", second)


async def test_candidate_i_gets_seed_plus_i(client: httpx.AsyncClient, gateway: FakeGateway) -> None:
    await complete(client, prompt=["Hi", "Yo"], n=3, seed=2**63 - 2)
    # 2**63 - 1 is the largest seed; the next one wraps to the smallest
    in_order = sorted(sent(gateway), key=lambda request: request.request_id)
    assert [request.body["seed"] for request in in_order] == [2**63 - 2, 2**63 - 1, -(2**63)] * 2


async def test_n_choices_equal_n_single_requests_with_seeds_counted_up(client: httpx.AsyncClient) -> None:
    together = await complete(client, model="kind", n=8, seed=5, max_tokens=4)
    singly = [await complete(client, model="kind", seed=5 + i, max_tokens=4) for i in range(8)]
    assert [c["text"] for c in together["choices"]] == [single["choices"][0]["text"] for single in singly]


async def test_every_candidate_is_one_engine_request_with_its_own_uid(
    client: httpx.AsyncClient, gateway: FakeGateway
) -> None:
    await complete(client, model="kind", prompt=["Hi", "Yo"], n=2)
    uids = [request.steering.uid for request in sent(gateway) if request.steering is not None]
    assert len(set(uids)) == 4
    assert all("n" not in request.body and "best_of" not in request.body for request in sent(gateway))


async def test_choice_index_is_prompt_index_times_n_plus_i(client: httpx.AsyncClient) -> None:
    data = await complete(client, prompt=["Hi", "Yo"], n=2, seed=3, max_tokens=2)
    assert [choice["index"] for choice in data["choices"]] == [0, 1, 2, 3]
    second = await complete(client, prompt="Yo", n=2, seed=3, max_tokens=2)
    assert [c["text"] for c in data["choices"][2:]] == [c["text"] for c in second["choices"]]


async def test_best_of_returns_the_n_most_probable_and_counts_all(client: httpx.AsyncClient) -> None:
    everything = await complete(client, n=6, seed=1, max_tokens=4, logprobs=0)
    means = {c["text"]: sum(c["logprobs"]["token_logprobs"]) / 4 for c in everything["choices"]}
    best = sorted(means, key=lambda text: -means[text])[:2]
    data = await complete(client, n=2, best_of=6, seed=1, max_tokens=4)
    assert [choice["text"] for choice in data["choices"]] == best
    # 2 prompt tokens once, 6 candidates of 4 tokens
    assert data["usage"] == {"prompt_tokens": 2, "completion_tokens": 24, "total_tokens": 26}
    selection = data["choices"][0]["selection"]
    assert selection["mean_logprob"] == pytest.approx(means[best[0]])
    assert (selection["reward"], selection["rank"], selection["num_candidates"]) == (None, 0, 6)


@pytest.mark.parametrize("best_of", [None, 1])
async def test_best_of_one_or_null_is_no_op(
    client: httpx.AsyncClient, gateway: FakeGateway, best_of: int | None
) -> None:
    data = await complete(client, best_of=best_of)
    assert len(sent(gateway)) == 1
    assert "selection" not in data["choices"][0]
    assert gateway.scoring.calls == []


async def test_a_routes_best_of_and_reward_hold_where_the_body_is_silent(
    client: httpx.AsyncClient, gateway: FakeGateway
) -> None:
    gateway.catalog.add_route("chosen", best_of=4, reward="length")
    gateway.scoring.rewards["length"] = lambda prompt, output: float(len(output))
    data = await complete(client, model="chosen", seed=1)
    assert data["choices"][0]["selection"]["num_candidates"] == 4
    assert data["choices"][0]["selection"]["reward"]["name"] == "length"
    alone = await complete(client, model="chosen", best_of=1)
    assert "selection" not in alone["choices"][0]


async def test_reward_ranks_all_candidates_and_reports_them(client: httpx.AsyncClient, gateway: FakeGateway) -> None:
    gateway.scoring.rewards["length"] = lambda prompt, output: float(len(output))
    everything = await complete(client, n=5, seed=1, max_tokens=3)
    longest = max((c["text"] for c in everything["choices"]), key=len)
    data = await complete(client, best_of=5, seed=1, max_tokens=3, reward="length", calibration={"size": 4})
    (choice,) = data["choices"]
    assert choice["text"] == longest
    assert choice["selection"]["reward"]["raw"] == len(longest)
    assert choice["selection"]["reward"]["calibration_size"] == 4
    assert gateway.scoring.calls[-1]["prompt"] == "Hi"
    # 5 candidates of 3 tokens are the answer's; 4 reference rollouts of 3 tokens stand apart
    assert data["usage"] == {"prompt_tokens": 2, "completion_tokens": 15, "total_tokens": 17, "reference_tokens": 12}


async def test_a_named_reward_scores_even_one_candidate(client: httpx.AsyncClient, gateway: FakeGateway) -> None:
    gateway.scoring.rewards["length"] = lambda prompt, output: 7.0
    data = await complete(client, reward="length")
    assert data["choices"][0]["selection"]["reward"]["raw"] == 7.0


async def test_reward_of_a_prompt_of_ids_sees_its_text(client: httpx.AsyncClient, gateway: FakeGateway) -> None:
    gateway.scoring.rewards["length"] = lambda prompt, output: 0.0
    await complete(client, prompt=[72, 105], reward="length")
    assert gateway.scoring.calls[-1]["prompt"] == "Hi"


async def test_reference_rollouts_are_unsteered_and_unseeded(client: httpx.AsyncClient, gateway: FakeGateway) -> None:
    gateway.scoring.rewards["length"] = lambda prompt, output: 0.0
    await complete(client, model="kind", reward="length", seed=9, temperature=0.5, calibration={"size": 3})
    steered, *references = sent(gateway)
    assert steered.steering is not None
    assert len(references) == 3
    for request in references:
        assert request.steering is None
        assert "seed" not in request.body  # draws of several requests are pooled and must be independent
        assert request.body["temperature"] == 0.5


async def test_reference_key_depends_on_sampling_and_not_on_seed_or_display(
    client: httpx.AsyncClient, gateway: FakeGateway
) -> None:
    gateway.scoring.rewards["length"] = lambda prompt, output: 0.0
    for extra in ({"seed": 1}, {"seed": 2, "logprobs": 3, "model": "kind"}, {"temperature": 0.5}):
        await complete(client, reward="length", **extra)
    first, second, third = [call["key"] for call in gateway.scoring.calls]
    assert first == second != third


async def test_echo_puts_each_prompts_text_first(client: httpx.AsyncClient) -> None:
    data = await complete(client, prompt=["Hi", "Yo"], echo=True, max_tokens=1)
    assert [choice["text"][:2] for choice in data["choices"]] == ["Hi", "Yo"]
    ids = await complete(client, prompt=[72, 105], echo=True, max_tokens=1, return_token_ids=True)
    assert ids["choices"][0]["text"].startswith("Hi")


async def test_echo_with_logprobs_covers_the_prompt_with_offsets_into_the_text(client: httpx.AsyncClient) -> None:
    (choice,) = (await complete(client, echo=True, logprobs=1, max_tokens=2))["choices"]
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    assert len(logprobs["tokens"]) == 2 + 2
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert choice["text"][offset : offset + len(token)] == token


async def test_the_engine_echoes_only_where_logprobs_of_the_prompt_are_wanted(
    client: httpx.AsyncClient, gateway: FakeGateway
) -> None:
    await complete(client, echo=True)
    await complete(client, echo=True, logprobs=0)
    assert ["echo" in request.body for request in sent(gateway)] == [False, True]


async def test_echo_with_max_tokens_zero_returns_the_prompt_alone(client: httpx.AsyncClient) -> None:
    data = await complete(client, echo=True, max_tokens=0, logprobs=0)
    assert data["choices"][0]["text"] == "Hi"
    assert data["choices"][0]["logprobs"]["tokens"] == ["H", "i"]
    assert data["usage"] == {"prompt_tokens": 2, "completion_tokens": 0, "total_tokens": 2}


async def test_logprobs_zero_is_asked_and_absent_is_not(client: httpx.AsyncClient) -> None:
    assert (await complete(client))["choices"][0]["logprobs"] is None
    assert (await complete(client, logprobs=0))["choices"][0]["logprobs"]["tokens"]


async def test_token_ids_only_when_asked(client: httpx.AsyncClient) -> None:
    (choice,) = (await complete(client, max_tokens=2, return_token_ids=True))["choices"]
    assert choice["prompt_token_ids"] == [72, 105]
    assert fake_model.detokenize(choice["token_ids"]) == choice["text"]


async def test_a_steered_answer_says_what_steered_it(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", json={"model": "kind", "prompt": "Hi"})
    assert response.json()["steering"] == {"adapters": [{"name": "kind", "version": KIND, "alpha": 1.0}]}
    assert response.headers["x-trimtab-steering"] == f"kind@{KIND};alpha=1.0"


async def test_the_steering_field_overrides_the_route(client: httpx.AsyncClient, gateway: FakeGateway) -> None:
    steering = {"adapters": [{"name": "kind", "alpha": 0.5}, {"name": "plain", "alpha": -0.5}]}
    data = await complete(client, model="kind", steering=steering)
    assert [(a["name"], a["alpha"]) for a in data["steering"]["adapters"]] == [("kind", 0.5), ("plain", -0.5)]
    assert sent(gateway)[0].steering is not None
    bare = await complete(client, model="kind", steering={"adapters": []})
    assert "steering" not in bare
    assert sent(gateway)[1].steering is None


async def test_alpha_zero_is_asked_of_the_engine_as_the_plain_base(
    client: httpx.AsyncClient, gateway: FakeGateway
) -> None:
    data = await complete(client, seed=4, steering={"adapters": [{"name": "kind", "alpha": 0}]})
    assert sent(gateway)[0].steering is None
    assert data["choices"][0]["text"] == (await complete(client, seed=4))["choices"][0]["text"]
    assert data["steering"]["adapters"][0]["alpha"] == 0.0


async def test_steering_logprobs_name_each_origin(client: httpx.AsyncClient) -> None:
    data = await complete(client, model="kind", max_tokens=2, steering_logprobs=True, logprobs=0, return_token_ids=True)
    (choice,) = data["choices"]
    shown = choice["steering_logprobs"]
    assert shown["token_ids"] == choice["token_ids"]
    assert shown["steered"] == choice["logprobs"]["token_logprobs"]
    assert len(shown["base"]) == len(shown["kl"]) == len(shown["flipped"]) == 2
    assert [len(values) for values in shown["adapter"]] == [2]


async def test_steering_logprobs_of_the_base_are_the_base_twice(client: httpx.AsyncClient) -> None:
    (choice,) = (await complete(client, max_tokens=2, steering_logprobs=True, logprobs=0))["choices"]
    shown = choice["steering_logprobs"]
    assert shown["base"] == shown["steered"] == choice["logprobs"]["token_logprobs"]
    assert (shown["adapter"], shown["kl"], shown["flipped"]) == ([], [0.0, 0.0], [False, False])


async def test_request_id_is_echoed_when_it_is_plain_and_replaced_when_not(client: httpx.AsyncClient) -> None:
    for presented, is_echoed in (("abc-1:2", True), ("a b", False), ("x" * 129, False)):
        response = await client.get("/health", headers={"x-request-id": presented})
        assert (response.headers["x-request-id"] == presented) == is_echoed
        assert response.headers["x-request-id"]


async def test_request_id_of_the_body_is_the_answers_when_the_header_has_none(client: httpx.AsyncClient) -> None:
    body = {"model": "base", "prompt": "Hi", "request_id": "mine"}
    assert (await client.post("/v1/completions", json=body)).headers["x-request-id"] == "mine"
    response = await client.post("/v1/completions", json=body, headers={"x-request-id": "header"})
    assert response.headers["x-request-id"] == "header"


async def test_the_same_request_id_twice_gives_different_answers_ids(client: httpx.AsyncClient) -> None:
    first = await complete(client, request_id="same")
    assert first["id"] != (await complete(client, request_id="same"))["id"]


async def test_versions_are_loaded_before_the_first_steered_token() -> None:
    gateway = build_gateway()
    async with asgi_client(gateway.app) as client:
        await complete(client, model="kind")
        await complete(client, model="kind")
    loads = [call for call in gateway.engine.observed.calls if call[0] != "status"]
    assert loads == [("prepare", KIND), ("commit", KIND)]


async def test_cached_and_reasoning_tokens_are_summed_where_the_engine_reports_them() -> None:
    class Reporting(FakeEngine):
        @override
        async def generate(self, request: EngineRequest) -> Any:
            candidate = await super().generate(request)
            candidate.usage["prompt_tokens_details"] = {"cached_tokens": 1}
            candidate.usage["completion_tokens_details"] = {"reasoning_tokens": 2}
            return candidate

    async with asgi_client(build_gateway(fake=Reporting()).app) as client:
        usage = (await complete(client, prompt=["Hi", "Yo"], n=2))["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}  # once per prompt
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 8}  # of all four candidates
