"""Operators and negative prompts: from requests and routes to the engine, the answer and the rollout."""

from typing import Any

import httpx
import pytest
from typing_extensions import override

from fake_gateway import KIND, FakeGateway, asgi_client, build_gateway
from trimtab_adapters.contract.errors import EngineRequestError
from trimtab_adapters.contract.params import SteeringOptions, SteeringParams
from trimtab_server.engine import fake_model
from trimtab_server.engine.fake import FakeEngine

pytestmark = pytest.mark.anyio

OPERATORS: dict[str, Any] = {"schedule": {"first": 2, "decay": 0.5}, "plausibility": 0.1, "max_kl": 0.5}
TOLD = {"schedule": {"start": 0, "first": 2, "decay": 0.5}, "plausibility": 0.1, "max_kl": 0.5}
RUDE = [{"role": "system", "content": "Be rude."}, {"role": "user", "content": "Hi"}]


async def ask(client: httpx.AsyncClient, endpoint: str = "completions", **body: Any) -> httpx.Response:
    asked = {"prompt": "Hi"} if endpoint == "completions" else {"messages": [{"role": "user", "content": "Hi"}]}
    return await client.post(
        "/v1/completions" if endpoint == "completions" else "/v1/chat/completions",
        json={"model": "base", "max_tokens": 4, **asked, **body},
    )


def sent(gateway: FakeGateway) -> SteeringParams | None:
    return gateway.engine.observed.requests[-1].steering


@pytest.mark.parametrize("endpoint", ["completions", "chat.completions"])
async def test_operators_without_adapters_act_on_the_routes_own(
    client: httpx.AsyncClient, gateway: FakeGateway, endpoint: str
) -> None:
    response = await ask(client, endpoint, model="kind", steering=OPERATORS)
    params = sent(gateway)
    assert params is not None
    assert [weight.version for weight in params.adapters] == [KIND]
    assert params.operators.model_dump() == TOLD
    assert response.json()["steering"] == {"adapters": [params.adapters[0].model_dump()], **TOLD}
    assert response.headers["x-trimtab-steering"] == (
        f"kind@{KIND};alpha=1.0, schedule;start=0;first=2;decay=0.5, plausibility;fraction=0.1, max_kl;nats=0.5"
    )
    (rollout,) = gateway.log.rollouts
    assert rollout.sampling["steering_operators"] == TOLD
    assert not rollout.is_plain
    (logprobs,) = rollout.adapter_logprobs or []
    assert [value is None for value in logprobs] == [False, False, True, True]


async def test_operators_with_nothing_to_act_on_leave_the_plain_base(
    client: httpx.AsyncClient, gateway: FakeGateway
) -> None:
    response = await ask(client, model="kind", steering={"adapters": [], **OPERATORS})
    assert sent(gateway) is None
    assert "steering" not in response.json()
    assert "x-trimtab-steering" not in response.headers
    assert gateway.log.rollouts[0].is_plain


@pytest.mark.parametrize(
    ("endpoint", "prompt", "token_ids"),
    [
        ("completions", "Rude", fake_model.tokenize("Rude")),
        ("completions", [7, 8, 9], [7, 8, 9]),
        ("chat.completions", RUDE, fake_model.tokenize(fake_model.render_chat(RUDE))),
    ],
)
@pytest.mark.parametrize("streams", [False, True])
async def test_guidance_alone_is_steering(endpoint: str, prompt: Any, token_ids: list[int], streams: bool) -> None:
    gateway = build_gateway()
    async with asgi_client(gateway.app) as client:
        plain = await ask(client, endpoint, seed=1)
        response = await ask(client, endpoint, seed=1, stream=streams, steering={"negative_prompt": prompt})
    assert response.status_code == 200, response.text
    params = sent(gateway)
    assert params is not None
    assert params.guidance is not None
    assert (params.adapters, params.guidance.token_ids, params.guidance.scale) == ([], token_ids, 1.5)
    assert response.headers["x-trimtab-steering"] == "guidance;scale=1.5"
    assert '"guidance_scale":1.5' in response.text
    unsteered, rollout = gateway.log.rollouts
    assert rollout.output_token_ids != unsteered.output_token_ids
    assert "steering" not in plain.json()
    assert (rollout.steering, rollout.sampling["guidance"]) == ([], {"token_ids": token_ids, "scale": 1.5})
    assert rollout.base_logprobs != rollout.steered_logprobs
    assert gateway.engine.observed.taken  # its record is checked like any other's
    metrics = gateway.parts.metrics.render().decode()
    assert 'trimtab:steered_tokens_total{model_name="base"} 4.0' in metrics


async def test_guidance_of_scale_one_is_asked_of_the_engine_as_the_plain_base(
    client: httpx.AsyncClient, gateway: FakeGateway
) -> None:
    response = await ask(client, steering={"negative_prompt": "Rude", "guidance_scale": 1.0})
    assert sent(gateway) is None
    assert response.json()["steering"] == {"adapters": [], "guidance_scale": 1.0}
    assert gateway.log.rollouts[0].is_plain


async def test_a_negative_prompt_is_tokenised_once_and_like_the_prompt(
    client: httpx.AsyncClient, gateway: FakeGateway
) -> None:
    for _ in range(3):
        await ask(client, steering={"negative_prompt": "Rude"})
    await ask(client, steering={"negative_prompt": "Rude"}, add_special_tokens=False)
    await ask(
        client, "chat.completions", steering={"negative_prompt": RUDE}, chat_template="T", chat_template_kwargs={"x": 1}
    )
    assert gateway.engine.observed.posted == [
        ("/tokenize", {"prompt": "Rude", "add_special_tokens": True}),
        ("/tokenize", {"prompt": "Rude", "add_special_tokens": False}),
        (
            "/tokenize",
            {"messages": RUDE, "add_generation_prompt": True, "chat_template": "T", "chat_template_kwargs": {"x": 1}},
        ),
    ]


async def test_reference_rollouts_of_a_guided_request_are_of_the_plain_base(
    client: httpx.AsyncClient, gateway: FakeGateway
) -> None:
    gateway.scoring.rewards["length"] = lambda prompt, output: float(len(output))
    steering = {"negative_prompt": "Rude", "explain": True}
    await ask(client, steering=steering, reward="length", calibration={"size": 2})
    first, *references = gateway.engine.observed.requests
    assert first.steering is not None
    assert [request.steering for request in references] == [None, None]
    assert all(rollout.is_plain for rollout in gateway.log.rollouts if rollout.endpoint == "reference")


@pytest.mark.parametrize(
    ("steering", "expected"),
    [
        ({}, {"plausibility": 0.2, "max_kl": 0.3}),
        ({"plausibility": 0.5}, {"plausibility": 0.5, "max_kl": 0.3}),
        ({"plausibility": None}, {"max_kl": 0.3}),
        ({"adapters": [{"name": "plain"}], "max_kl": None}, {"plausibility": 0.2}),
    ],
)
async def test_operators_of_a_request_replace_the_routes_field_by_field(
    client: httpx.AsyncClient, gateway: FakeGateway, steering: dict[str, Any], expected: dict[str, Any]
) -> None:
    kind = gateway.catalog.revisions["kind"].steering
    gateway.catalog.add_route("careful", steering=kind, options=SteeringOptions(plausibility=0.2, max_kl=0.3))
    response = await ask(client, model="careful", steering=steering)
    told = response.json()["steering"]
    assert {name: value for name, value in told.items() if name != "adapters"} == expected


async def test_a_request_may_take_a_routes_negative_prompt_away_or_put_its_own(
    client: httpx.AsyncClient, gateway: FakeGateway
) -> None:
    gateway.catalog.add_route("polite", options=SteeringOptions(negative_prompt="Rude", guidance_scale=3.0))
    assert (await ask(client, model="polite")).json()["steering"]["guidance_scale"] == 3.0
    assert "steering" not in (await ask(client, model="polite", steering={"negative_prompt": None})).json()
    await ask(client, model="polite", steering={"negative_prompt": [1, 2], "guidance_scale": 2.0})
    params = sent(gateway)
    assert params is not None
    assert params.guidance is not None
    assert (params.guidance.token_ids, params.guidance.scale) == ([1, 2], 2.0)
    chat = await ask(client, "chat.completions", model="polite")
    assert (chat.status_code, chat.json()["error"]["param"]) == (400, "steering.negative_prompt")
    models = {model["id"]: model for model in (await client.get("/v1/models")).json()["data"]}
    assert models["polite"]["steering"] == {"adapters": [], "guidance_scale": 3.0}  # the prompt itself is not told


@pytest.mark.parametrize(
    ("endpoint", "steering", "param", "message"),
    [
        ("completions", {"plausibility": 0}, "plausibility", "> 0"),
        ("completions", {"plausibility": 1.5}, "plausibility", "<= 1"),
        ("completions", {"plausibility": "1"}, "plausibility", "a decimal"),
        ("completions", {"max_kl": 0}, "max_kl", ">= 0.0001"),
        ("completions", {"schedule": {"first": 0}}, "schedule.first", ">= 1"),
        ("completions", {"schedule": {"decay": 1.1}}, "schedule.decay", "<= 1"),
        ("completions", {"schedule": {"last": 3}}, "schedule.last", "Unrecognized"),
        ("completions", {"schedule": 5}, "schedule", "an object"),
        ("completions", {"guidance_scale": 0, "negative_prompt": "a"}, "guidance_scale", "> 0"),
        ("completions", {"guidance_scale": 2.0}, "guidance_scale", "needs 'steering.negative_prompt'"),
        ("chat.completions", {"guidance_scale": 2.0}, "guidance_scale", "needs 'steering.negative_prompt'"),
        ("completions", {"negative_prompt": ""}, "negative_prompt", "must not be empty"),
        ("completions", {"negative_prompt": []}, "negative_prompt", "must not be empty"),
        ("completions", {"negative_prompt": 5}, "negative_prompt", "an integer"),
        ("completions", {"negative_prompt": [-1]}, "negative_prompt", "token ids from 0"),
        ("completions", {"negative_prompt": [True]}, "negative_prompt", "token ids"),
        ("completions", {"negative_prompt": ["a"]}, "negative_prompt", "token ids"),
        ("completions", {"negative_prompt": [{"role": "user"}]}, "negative_prompt", "'content'"),
        ("completions", {"negative_prompt": RUDE}, "negative_prompt", "messages are for chat"),
        ("completions", {"negative_prompt": [999]}, "negative_prompt", "no token 999"),
        ("completions", {"negative_prompt": "a" * 61}, "negative_prompt", "maximum context length is 64"),
        ("chat.completions", {"negative_prompt": "Rude"}, "negative_prompt", "send messages"),
        ("chat.completions", {"negative_prompt": [1, 2]}, "negative_prompt", "send messages"),
        ("completions", {"explain": -1}, "explain", "from 0 to 20"),
        ("completions", {"explain": 21}, "explain", "from 0 to 20"),
        ("completions", {"explain": "yes"}, "explain", "a boolean or an integer"),
        ("completions", {"explain": 1.5}, "explain", "a boolean or an integer"),
        ("completions", {"alpha": 1}, "alpha", "Unrecognized"),
    ],
)
async def test_a_bad_operator_is_400_naming_the_field(
    endpoint: str, steering: dict[str, Any], param: str, message: str
) -> None:
    gateway = build_gateway(fake=FakeEngine(max_model_len=64))
    async with asgi_client(gateway.app) as client:
        response = await ask(client, endpoint, steering=steering)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["param"], error["type"]) == (f"steering.{param}", "invalid_request_error")
    assert message in error["message"]
    assert gateway.engine.observed.requests == []


async def test_the_longest_negative_prompt_that_fits_is_taken() -> None:
    gateway = build_gateway(fake=FakeEngine(max_model_len=64))
    async with asgi_client(gateway.app) as client:
        assert (await ask(client, steering={"negative_prompt": "a" * 60})).status_code == 200


@pytest.mark.parametrize("endpoint", ["completions", "chat.completions"])
async def test_an_engine_that_cannot_guide_is_400_that_says_why(endpoint: str) -> None:
    gateway = build_gateway(fake=FakeEngine(can_guide=False))
    prompt = "Rude" if endpoint == "completions" else RUDE
    async with asgi_client(gateway.app) as client:
        response = await ask(client, endpoint, model="kind", steering={"negative_prompt": prompt})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "steering.negative_prompt")
    assert "as its own expert" in response.json()["error"]["message"]
    assert gateway.engine.observed.requests == []


async def test_a_refusal_to_tokenise_names_the_negative_prompt_and_is_not_remembered() -> None:
    class Strict(FakeEngine):
        refuses = True

        @override
        async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
            if self.refuses:
                raise EngineRequestError("this tokenizer does not like it", engine_status=400)
            return await super().post(path, body)

    fake = Strict()
    async with asgi_client(build_gateway(fake=fake).app) as client:
        response = await ask(client, steering={"negative_prompt": "Rude"})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "steering.negative_prompt")
        assert "does not like it" in response.json()["error"]["message"]
        fake.refuses = False
        assert (await ask(client, steering={"negative_prompt": "Rude"})).status_code == 200


async def test_a_route_with_operators_can_be_drawn_from_as_the_plain_base(
    client: httpx.AsyncClient, gateway: FakeGateway
) -> None:
    options = SteeringOptions(negative_prompt="Rude", plausibility=0.2)
    gateway.catalog.add_route("polite", steering=gateway.catalog.revisions["kind"].steering, options=options)
    await ask(client, model="polite", steering={"adapters": []})
    guided = sent(gateway)
    assert guided is not None  # the negative prompt is not an adapter
    assert guided.is_active
    await ask(client, model="polite", steering={"adapters": [], "negative_prompt": None})
    assert sent(gateway) is None
