"""Everything that a caller can get wrong, and everything that can go wrong behind the gateway."""

from typing import Any

import httpx
import pytest
from typing_extensions import override

from fake_gateway import KIND, FakeGateway, asgi_client, build_gateway, failing_reward
from trimtab_adapters.contract.errors import (
    EngineDiedError,
    EngineRequestError,
    EngineUnavailableError,
    StorageError,
    TrimtabError,
    WeightsError,
)
from trimtab_server.api.json_body import parse_json_object
from trimtab_server.engine.fake import FakeEngine, Fault

pytestmark = pytest.mark.anyio

TYPE = "invalid_type"

BAD_COMPLETIONS: list[tuple[dict[str, Any], str | None, str]] = [
    # fields, param, part of the message
    ({"prompt": None}, "prompt", "Missing required parameter: 'prompt'."),
    ({"model": None}, "model", "Missing required parameter: 'model'."),
    ({"model": 5}, "model", "Invalid type for 'model': expected a string, but got an integer instead."),
    ({"frobnicate": 1}, "frobnicate", "Unrecognized request argument supplied: frobnicate"),
    ({"frobnicate": None}, "frobnicate", "Unrecognized request argument supplied: frobnicate"),
    ({"b": 1, "a": 1}, None, "Unrecognized request arguments supplied: a, b"),
    ({"prompt": ""}, "prompt", "must not be empty"),
    ({"prompt": []}, "prompt", "empty"),
    ({"prompt": [[]]}, "prompt", "must not be empty"),
    ({"prompt": ["a", 1]}, "prompt", "only"),
    ({"prompt": [True, 1]}, "prompt", "only"),
    ({"prompt": [-1]}, "prompt", "negative"),
    ({"prompt": 5}, "prompt", "an integer"),
    ({"prompt": {"text": "a"}}, "prompt", "an object"),
    ({"prompt": ["a"] * 1025}, "prompt", "maximum length 1024"),
    ({"prompt": ["a"] * 1024, "n": 17}, "prompt", "16384"),
    ({"n": 0}, "n", "Invalid 'n': integer below minimum value. Expected a value >= 1, but got 0 instead."),
    ({"n": 129}, "n", "Invalid 'n': integer above maximum value. Expected a value <= 128, but got 129 instead."),
    ({"n": 1.5}, "n", "expected an integer, but got a decimal instead"),
    ({"n": "1"}, "n", "expected an integer, but got a string instead"),
    ({"n": True}, "n", "expected an integer, but got a boolean instead"),
    ({"best_of": 0}, "best_of", "below minimum"),
    ({"best_of": 21}, "best_of", "above maximum"),
    ({"n": 3, "best_of": 2}, "best_of", "more choices than it will generate"),
    ({"best_of": 2, "stream": True}, "stream", "Results cannot be streamed"),
    ({"reward": "r", "stream": True}, "stream", "Results cannot be streamed"),
    ({"temperature": -0.1}, "temperature", "decimal below minimum value. Expected a value >= 0"),
    ({"temperature": 2.1}, "temperature", "decimal above maximum value. Expected a value <= 2"),
    ({"temperature": "hot"}, "temperature", "expected a decimal, but got a string instead"),
    ({"temperature": True}, "temperature", "expected a decimal, but got a boolean instead"),
    ({"top_p": 0}, "top_p", "Expected a value > 0"),
    ({"top_p": 1.1}, "top_p", "Expected a value <= 1"),
    ({"frequency_penalty": 2.5}, "frequency_penalty", "above maximum"),
    ({"presence_penalty": -2.5}, "presence_penalty", "below minimum"),
    ({"logprobs": 21}, "logprobs", "above maximum"),
    ({"logprobs": -1}, "logprobs", "below minimum"),
    ({"logprobs": True}, "logprobs", "expected an integer"),
    ({"max_tokens": -1}, "max_tokens", "below minimum"),
    ({"max_tokens": 0}, "max_tokens", "only with 'echo'"),
    ({"max_tokens": "many"}, "max_tokens", "expected an integer"),
    ({"seed": 2**63}, "seed", "above maximum"),
    ({"seed": 1.0}, "seed", "expected an integer"),
    ({"stop": ["a"] * 5}, "stop", "maximum length 4"),
    ({"stop": [""]}, "stop", "empty"),
    ({"stop": [1]}, "stop", "array of strings"),
    ({"stop": 1}, "stop", "array of strings"),
    ({"logit_bias": {"a": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"1": 101}}, "logit_bias", "between -100 and 100"),
    ({"logit_bias": {"1": "x"}}, "logit_bias", "numbers"),
    ({"logit_bias": [1]}, "logit_bias", "expected an object"),
    ({"stream": "yes"}, "stream", "expected a boolean"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "only allowed when 'stream' is enabled"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "Unrecognized"),
    ({"stream": True, "stream_options": 1}, "stream_options", "expected an object"),
    ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "stream"),
    ({"echo": "yes"}, "echo", "expected a boolean"),
    ({"user": 1}, "user", "expected a string"),
    ({"prompt_embeds": "AAAA"}, "prompt_embeds", "not supported: embeddings"),
    ({"kv_transfer_params": {}}, "kv_transfer_params", "not supported"),
    ({"ec_transfer_params": {}}, "ec_transfer_params", "not supported"),
    ({"mm_payload": "none"}, "mm_payload", "not supported"),
    ({"return_mm_kwargs": True}, "return_mm_kwargs", "not supported"),
    ({"return_token_offsets": True}, "return_token_offsets", "render"),
    ({"use_beam_search": True}, "use_beam_search", "best_of"),
    ({"length_penalty": 2.0}, "length_penalty", "use_beam_search"),
    ({"vllm_xargs": {"trimtab": "{}"}}, "vllm_xargs.trimtab", "field 'steering'"),
    ({"vllm_xargs": {"x": {"y": 1}}}, "vllm_xargs.x", "strings, numbers"),
    ({"vllm_xargs": {"x": True}}, "vllm_xargs.x", "strings, numbers"),
    ({"vllm_xargs": 1}, "vllm_xargs", "expected an object"),
    ({"logprob_token_ids": [1]}, "logprob_token_ids", "needs 'logprobs'"),
    ({"truncation_side": "middle"}, "truncation_side", "Supported values are: 'left' or 'right'"),
    ({"request_id": "a b"}, "request_id", "letters"),
    ({"cache_salt": ""}, "cache_salt", "cache_salt"),
    ({"steering": 5}, "steering", "steering"),
    ({"steering": {"adapter": []}}, "steering.adapter", "adapter"),
    ({"steering": {"adapters": [{"name": "kind", "alpha": "1"}]}}, "steering.adapters[0].alpha", "a decimal"),
    ({"steering": {"adapters": [{"name": "kind", "alpha": 101}]}}, "steering.adapters[0].alpha", "<= 100"),
    ({"steering": {"adapters": [{"name": "kind", "x": 1}]}}, "steering.adapters[0].x", "Unrecognized"),
    ({"steering": {"adapters": [{"name": "no spaces"}]}}, "steering.adapters[0].name", "name"),
    ({"steering": {"adapters": [{"name": "kind", "version": "v1"}]}}, "steering.adapters[0].version", "version"),
    ({"steering": {"adapters": [{"name": "kind"}] * 9}}, "steering.adapters", "maximum length 8"),
    ({"steering": {"adapters": [{"name": "kind"}] * 2}}, "steering", "appears twice"),
    ({"steering_logprobs": 1}, "steering_logprobs", "expected a boolean"),
    ({"reward": 1}, "reward", "expected a string"),
    ({"calibration": {"size": 4}}, "calibration", "needs a 'reward'"),
    ({"reward": "r", "calibration": {"size": -1}}, "calibration.size", "below minimum"),
    ({"reward": "r", "calibration": {"method": "best"}}, "calibration.method", "Supported values"),
]


@pytest.mark.parametrize(("fields", "param", "message"), BAD_COMPLETIONS)
async def test_bad_completion_request_is_400_naming_the_field(
    client: httpx.AsyncClient, gateway: FakeGateway, fields: dict[str, Any], param: str | None, message: str
) -> None:
    response = await client.post("/v1/completions", json={"model": "base", "prompt": "Hi", **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert message in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}
    assert gateway.engine.observed.requests == []


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b'{"model": "base", "prompt": "Hi", "temperature": NaN}', "invalid_json"),
        (b'{"model": "base", "prompt": "Hi", "temperature": -Infinity}', "invalid_json"),
        (b'{"model": "base", "prompt": "Hi", "temperature": 1e999}', "invalid_json"),
        (b"[1]", "invalid_json"),
        (b'"text"', "invalid_json"),
        (b"\xff\xfe", "invalid_json"),
        (b'{"seed": ' + b"1" * 5000 + b"}", "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"model": "base", "prompt": "\\ud800"}', "invalid_unicode"),
        (b'{"model": "base", "prompt": "Hi", "stop": ["\\uDFFF"]}', "invalid_unicode"),
        (b'{"model": "base", "prompt": "Hi", "\\ud800": 1}', "invalid_unicode"),
    ],
)
async def test_a_body_that_is_not_proper_json_is_400(client: httpx.AsyncClient, raw: bytes, code: str) -> None:
    response = await client.post("/v1/completions", content=raw, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == code


def test_a_surrogate_pair_is_a_character() -> None:
    assert parse_json_object(b'{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", None])
async def test_another_content_type_is_415(client: httpx.AsyncClient, content_type: str | None) -> None:
    headers = {"content-type": content_type} if content_type else {}
    response = await client.post("/v1/completions", content=b'{"model": "base", "prompt": "Hi"}', headers=headers)
    assert response.status_code == 415
    assert "application/json" in response.json()["error"]["message"]


@pytest.mark.parametrize("is_declared", [True, False])
async def test_a_body_over_the_limit_is_413(is_declared: bool) -> None:
    async def parts() -> Any:
        for _ in range(3):
            yield b" " * 50

    gateway = build_gateway(max_body_bytes=100)
    async with asgi_client(gateway.app, **{"content-type": "application/json"}) as client:
        content = b" " * 150 if is_declared else parts()
        response = await client.post("/v1/completions", content=content)
        assert response.status_code == 413
        assert "100 bytes" in response.json()["error"]["message"]
        small = await client.post("/v1/completions", json={"model": "base", "prompt": "Hi"})
        assert small.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nowhere", 404, "unknown_url"),
        ("GET", "/v1/completions", 405, "method_not_supported"),
        ("POST", "/v1/models", 405, "method_not_supported"),
        ("GET", "/v1/models/nobody", 404, "model_not_found"),
    ],
)
async def test_wrong_urls_and_methods_answer_error_objects(
    client: httpx.AsyncClient, method: str, path: str, status: int, code: str
) -> None:
    response = await client.request(method, path)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "nobody"}, "model"),
        ({"steering": {"adapters": [{"name": "nobody"}]}}, "steering"),
        ({"steering": {"adapters": [{"name": "kind", "version": "f" * 16}]}}, "steering"),
        ({"reward": "nobody"}, "reward"),
    ],
)
async def test_unknown_names_are_404(client: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    response = await client.post("/v1/completions", json={"model": "base", "prompt": "Hi", **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (404, param)


ENGINE_ERRORS: list[tuple[TrimtabError, int, str]] = [
    (EngineRequestError("logprobs too many", engine_status=400), 400, "logprobs too many"),
    (EngineRequestError("no such thing", engine_status=404), 404, "no such thing"),
    (EngineRequestError("slow down", engine_status=429), 429, "slow down"),
    (EngineRequestError("secret traceback", engine_status=500), 502, "The engine failed while answering"),
    (EngineRequestError("wrong engine key", engine_status=401), 502, "The engine failed while answering"),
    (EngineUnavailableError("starting", retry_after_s=3), 503, "starting"),
    (EngineDiedError("gone", retry_after_s=3), 503, "gone"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "status", "message"), ENGINE_ERRORS)
async def test_engine_errors_before_the_first_token_have_their_true_status(
    error: TrimtabError, status: int, message: str, stream: bool
) -> None:
    gateway = build_gateway(fake=FakeEngine(fault_for=lambda _: Fault(error=error)))
    async with asgi_client(gateway.app) as client:
        body = {"model": "base", "prompt": "Hi", "stream": stream}
        response = await client.post("/v1/completions", json=body)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert message in response.json()["error"]["message"]
    assert "secret" not in response.text
    assert response.headers.get("retry-after") == ("3" if status == 503 else None)


async def test_prompt_too_long_is_the_engines_own_400() -> None:
    gateway = build_gateway(fake=FakeEngine(max_model_len=8))
    async with asgi_client(gateway.app) as client:
        response = await client.post("/v1/completions", json={"model": "base", "prompt": "x" * 8})
    assert response.status_code == 400
    assert "maximum context length is 8 tokens" in response.json()["error"]["message"]


async def test_one_failing_candidate_fails_the_request_and_stops_the_others() -> None:
    fake = FakeEngine(fault_for=lambda r: Fault(EngineDiedError("gone")) if r.request_id.endswith("-0-2") else None)
    fake.hold_after(1)
    gateway = build_gateway(fake=fake)
    async with asgi_client(gateway.app) as client:
        response = await client.post("/v1/completions", json={"model": "base", "prompt": "Hi", "n": 4})
    assert response.status_code == 503
    assert fake.observed.running == 0
    assert len(fake.observed.aborted) == 4
    assert gateway.log.rollouts == []


async def test_failed_steering_is_an_error_and_never_an_answer() -> None:
    fault = Fault(steering="the adapter's logits are NaN", after_tokens=2)
    gateway = build_gateway(fake=FakeEngine(fault_for=lambda r: fault if r.steering else None))
    async with asgi_client(gateway.app) as client:
        response = await client.post("/v1/completions", json={"model": "kind", "prompt": "Hi"})
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "steering_failed"
        assert "the adapter's logits are NaN" in response.json()["error"]["message"]
        assert (await client.post("/v1/completions", json={"model": "base", "prompt": "Hi"})).status_code == 200


async def test_a_version_that_the_engine_refuses_is_not_the_callers_fault() -> None:
    fake = FakeEngine(refuse_version=lambda version: WeightsError("NaN weights"))
    async with asgi_client(build_gateway(fake=fake).app) as client:
        response = await client.post("/v1/completions", json={"model": "kind", "prompt": "Hi"})
    assert (response.status_code, response.json()["error"]["code"]) == (500, "steering_failed")
    assert "NaN weights" in response.json()["error"]["message"]


@pytest.mark.parametrize("drop", ["missing", "foreign", "short"])
async def test_a_steered_answer_without_its_record_is_withheld(drop: str) -> None:
    class Forgetful(FakeEngine):
        @override
        async def take_records(self, uids: Any) -> Any:
            records = await super().take_records(uids)
            for record in records.values():
                if drop == "foreign":
                    record.token_ids[0] += 1
                elif drop == "short":
                    record.num_tokens -= 1
            return {} if drop == "missing" else records

    async with asgi_client(build_gateway(fake=Forgetful()).app) as client:
        response = await client.post("/v1/completions", json={"model": "kind", "prompt": "Hi"})
    assert (response.status_code, response.json()["error"]["code"]) == (500, "steering_failed")


async def test_a_failing_reward_is_502_and_never_zero(client: httpx.AsyncClient, gateway: FakeGateway) -> None:
    gateway.scoring.rewards["down"] = failing_reward
    body = {"model": "base", "prompt": "Hi", "best_of": 2, "reward": "down"}
    response = await client.post("/v1/completions", json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (502, "reward_failed")


async def test_a_failing_log_fails_the_request_in_durable_mode_only() -> None:
    for mode, status in (("durable", 500), ("async", 200)):
        gateway = build_gateway(rollouts=mode)
        gateway.log.error = StorageError("disk full")
        async with asgi_client(gateway.app) as client:
            response = await client.post("/v1/completions", json={"model": "base", "prompt": "Hi"})
        assert response.status_code == status


async def test_an_unexpected_error_is_a_plain_500_with_the_request_id(
    gateway: FakeGateway, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*args: Any) -> Any:
        raise KeyError("secret")

    monkeypatch.setattr(gateway.catalog, "resolve", broken)
    async with asgi_client(gateway.app) as client:
        response = await client.post(
            "/v1/completions", json={"model": "base", "prompt": "Hi"}, headers={"x-request-id": "trace-me"}
        )
    assert response.status_code == 500
    assert response.headers["x-request-id"] == "trace-me"
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    assert "trace-me" in caplog.text


async def test_the_route_says_why_its_best_of_cannot_be_streamed(
    client: httpx.AsyncClient, gateway: FakeGateway
) -> None:
    gateway.catalog.add_route("chosen", best_of=4)
    response = await client.post("/v1/completions", json={"model": "chosen", "prompt": "Hi", "stream": True})
    assert response.status_code == 400
    assert "the route 'chosen'" in response.json()["error"]["message"]
    body = {"model": "chosen", "prompt": "Hi", "stream": True, "best_of": 1}
    assert (await client.post("/v1/completions", json=body)).status_code == 200


async def test_a_request_that_takes_too_long_is_504() -> None:
    fake = FakeEngine()
    fake.hold_after(1)
    async with asgi_client(build_gateway(fake=fake, request_timeout_s=0.05).app) as client:
        response = await client.post("/v1/completions", json={"model": "base", "prompt": "Hi"})
    assert (response.status_code, response.json()["error"]["code"]) == (504, "request_timeout")
    assert fake.observed.running == 0


async def test_after_an_engine_restart_versions_are_loaded_again(
    client: httpx.AsyncClient, gateway: FakeGateway
) -> None:
    body = {"model": "kind", "prompt": "Hi"}
    assert (await client.post("/v1/completions", json=body)).status_code == 200
    gateway.engine.is_up = False
    gateway.engine.restart()
    assert (await client.post("/v1/completions", json=body)).status_code == 503
    gateway.engine.is_up = True
    assert (await client.post("/v1/completions", json=body)).status_code == 200
    assert gateway.engine.versions[KIND].state == "committed"
