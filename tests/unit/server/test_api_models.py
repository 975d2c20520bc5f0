import re

import httpx
import pytest

from fake_gateway import KIND, FakeGateway, build_gateway, serving
from trimtab_adapters.contract.params import AdapterWeight

pytestmark = pytest.mark.anyio


async def test_models_are_the_base_and_the_routes(client: httpx.AsyncClient) -> None:
    data = (await client.get("/v1/models")).json()
    assert data["object"] == "list"
    base, kind = data["data"]
    assert (base["id"], base["owned_by"], base["parent"]) == ("base", "trimtab", None)
    assert "steering" not in base
    assert (kind["id"], kind["owned_by"], kind["parent"], kind["created"]) == ("kind", "trimtab", "base", 7)
    assert kind["steering"] == {"adapters": [{"name": "kind", "version": KIND, "alpha": 1.0}]}


async def test_a_model_is_found_by_an_id_with_slashes(client: httpx.AsyncClient, gateway: FakeGateway) -> None:
    gateway.catalog.add_route("org/model/kind", steering=(AdapterWeight(name="kind", version=KIND, alpha=2.0),))
    for path in ("/v1/models/org/model/kind", "/v1/models/org%2Fmodel%2Fkind"):
        response = await client.get(path)
        assert (response.status_code, response.json()["id"]) == (200, "org/model/kind")


async def test_health_is_200_and_ready_503_while_the_engine_is_down(
    client: httpx.AsyncClient, gateway: FakeGateway
) -> None:
    gateway.engine.is_up = False
    assert (await client.get("/health")).status_code == 200
    response = await client.get("/ready")
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert response.json()["error"]["code"] == "engine_unavailable"


async def test_ready_waits_for_the_active_versions(client: httpx.AsyncClient, gateway: FakeGateway) -> None:
    response = await client.get("/ready")
    assert response.status_code == 503
    assert f"kind@{KIND}" in response.json()["error"]["message"]
    await gateway.residency.converge()
    assert (await client.get("/ready")).status_code == 200


async def test_background_tasks_run_with_the_application_and_end_with_it() -> None:
    gateway = build_gateway()
    gateway.parts.background = [gateway.residency.keep_converged]
    async with serving(gateway.app) as url, httpx.AsyncClient(base_url=url) as client:
        for _ in range(1000):
            if (await client.get("/ready")).status_code == 200:
                break
        assert gateway.engine.versions[KIND].state == "committed"


async def test_version_names_trimtab_and_the_engine(client: httpx.AsyncClient, gateway: FakeGateway) -> None:
    assert (await client.get("/version")).json()["vllm_version"] is None
    await gateway.residency.converge()
    assert (await client.get("/version")).json()["vllm_version"] == "0.32.0"


async def test_tokenize_and_detokenize_are_the_engines(client: httpx.AsyncClient) -> None:
    tokens = (await client.post("/tokenize", json={"model": "kind", "prompt": "Hi"})).json()
    assert tokens["tokens"] == [72, 105]
    assert (await client.post("/detokenize", json={"tokens": [72, 105]})).json() == {"prompt": "Hi"}
    unknown = await client.post("/tokenize", json={"model": "nobody", "prompt": "Hi"})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    refused = await client.post("/detokenize", json={"tokens": [10**6]})
    assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")


def value(text: str, series: str) -> float:
    match = re.search(rf"^{re.escape(series)} (\S+)$", text, re.MULTILINE)
    assert match is not None, f"{series} is not in\n{text}"
    return float(match[1])


async def test_metrics_count_tokens_candidates_latencies_and_errors(
    client: httpx.AsyncClient, gateway: FakeGateway
) -> None:
    gateway.scoring.rewards["flat"] = lambda prompt, output: 0.0
    body = {"model": "kind", "prompt": ["Hi", "Yo"], "max_tokens": 3, "best_of": 2}
    await client.post("/v1/completions", json={**body, "reward": "flat", "calibration": {"size": 2}})
    await client.post("/v1/completions", json={"model": "kind", "prompt": "Hi", "max_tokens": 3, "stream": True})
    await client.post("/v1/completions", json={"model": "nobody", "prompt": "Hi"})
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    text, label = response.text, '{model_name="kind"}'
    assert value(text, f"trimtab:prompt_tokens_total{label}") == 4 + 2
    assert value(text, f"trimtab:generation_tokens_total{label}") == 2 * 2 * 3 + 3
    assert value(text, f"trimtab:reference_tokens_total{label}") == 2 * 2 * 3
    assert value(text, f"trimtab:candidates_total{label}") == 4 + 1
    assert value(text, f"trimtab:rollouts_logged_total{label}") == 4 + 4 + 1
    assert value(text, f"trimtab:num_requests_running{label}") == 0
    assert value(text, f"trimtab:time_to_first_token_seconds_count{label}") == 1
    assert value(text, f"trimtab:inter_token_latency_seconds_count{label}") == 2
    assert value(text, f"trimtab:e2e_request_latency_seconds_count{label}") == 2
    assert value(text, 'trimtab:request_success_total{finished_reason="length",model_name="kind"}') == 2 + 1
    assert value(text, f"trimtab:steered_tokens_total{label}") == 15
    assert value(text, f"trimtab:flipped_tokens_total{label}") == 15
    errors = 'trimtab:request_errors_total{code="model_not_found",endpoint="completions",status="404"}'
    assert value(text, errors) == 1


async def test_running_requests_are_counted_while_they_run(gateway: FakeGateway) -> None:
    gateway.engine.hold_after(1)
    async with serving(gateway.app) as url, httpx.AsyncClient(base_url=url) as client:
        body = {"model": "base", "prompt": "Hi", "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            text = (await client.get("/metrics")).text
            assert value(text, 'trimtab:num_requests_running{model_name="base"}') == 1
            gateway.engine.release()
            await response.aread()
        text = (await client.get("/metrics")).text
    assert value(text, 'trimtab:num_requests_running{model_name="base"}') == 0


async def test_two_gateways_in_one_process_share_nothing(client: httpx.AsyncClient) -> None:
    await client.post("/v1/completions", json={"model": "base", "prompt": "Hi"})
    assert "model_name" not in build_gateway().parts.metrics.render().decode()
