"""Calibrated rewards on a real engine: uniform for held-out samples of the base, refused when they no longer hold."""

import json
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import ConflictError, OpenAI

from gateway_process import RunningGateway
from tiny_models import TinyModels
from trimtab_adapters.contract.uniformity import ks_critical, ks_distance, randomised_rank

pytestmark = pytest.mark.engine

SETTINGS = {"max_tokens": 6, "temperature": 1.0, "ignore_eos": True}
PROMPTS = [f"t{1 + number} t{7 + 3 * number % 90} t{2 + number % 5}" for number in range(40)]


@pytest.fixture(scope="module")
def http(gateway: RunningGateway) -> Iterator[httpx.Client]:
    with gateway.client() as client:
        yield client


@pytest.fixture(scope="module")
def client(gateway: RunningGateway) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def reward(http: httpx.Client, tiny_models: TinyModels) -> str:
    """A classifier: a continuous reward, so that ties are rare."""
    spec = {"name": "calibrated-taste", "kind": "hf_classifier", "target": str(tiny_models.classifier)}
    answer = http.post("/admin/rewards", json=spec)
    assert answer.status_code == 200, answer.text
    return spec["name"]


def trimtab(gateway: RunningGateway, *arguments: str, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "trimtab_server.cli", *arguments, "--url", gateway.url],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout if status == 0 else done.stderr


def rewards_of(client: OpenAI, reward: str, calibration: dict[str, Any], prompt: str, **fields: Any) -> list[Any]:
    given = {"model": "base", "prompt": prompt, "max_tokens": 6, "temperature": 1.0, **fields}
    body = {"reward": reward, "calibration": calibration, "ignore_eos": True}
    answer = client.completions.create(**given, extra_body=body)
    return [(choice.model_extra or {})["selection"]["reward"] for choice in answer.choices]


def test_a_held_out_base_sample_has_a_uniform_rank_among_reference_rollouts(client: OpenAI, reward: str) -> None:
    # One sample for each of 40 prompts, each ranked among 12 reference rollouts of its own: independent and, ties
    # broken at random, exactly uniform. The distance then exceeds the critical value at 0.1 % in 1 of 1000 runs.
    values = []
    for number, prompt in enumerate(PROMPTS):
        [value] = rewards_of(client, reward, {"size": 12}, prompt)
        assert (value["calibration_method"], value["calibration_size"]) == ("reference", 12)
        # The half-tie value gives the sum 2 · below + equal; a tie is taken for one equal rollout.
        twice = round(value["calibrated"] * 24)
        coin = zlib.crc32(str(number).encode()) / 2**32
        values.append(randomised_rank(twice // 2, twice % 2, 12, coin))
    assert ks_distance(values) < ks_critical(len(values), alpha=0.001)


def test_leave_one_out_draws_nothing_and_has_mean_one_half(client: OpenAI, reward: str) -> None:
    found = rewards_of(client, reward, {"method": "leave_one_out"}, PROMPTS[0], n=8)
    assert sum(value["calibrated"] for value in found) / 8 == pytest.approx(0.5, abs=1e-12)
    assert {value["calibration_size"] for value in found} == {7}


def test_unsteered_candidates_in_the_log_are_reference_rollouts(
    client: OpenAI, http: httpx.Client, reward: str
) -> None:
    prompt = "t11 t12 t13 t14"
    fields: dict[str, Any] = {"model": "base", "prompt": prompt, "max_tokens": 6, "temperature": 1.0}
    client.completions.create(**fields, n=6, extra_body={"ignore_eos": True})
    client.completions.create(**fields, n=6, seed=5, extra_body={"ignore_eos": True})  # seeded: not independent
    assert http.get("/admin/rollouts", params={"limit": 1}).status_code == 200  # brings the log to the database
    answer = client.completions.create(
        **fields, best_of=2, extra_body={"reward": reward, "calibration": {"size": 10}, "ignore_eos": True}
    )
    assert answer.usage is not None
    # 10 - 6 were drawn, 6 tokens each.
    assert (answer.usage.model_extra or {})["reference_tokens"] == 4 * 6


def test_the_command_fits_a_pooled_calibrator_that_requests_use_until_it_is_stale(
    gateway: RunningGateway, client: OpenAI, http: httpx.Client, reward: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    prompts, report, plot = tmp_path / "prompts.jsonl", tmp_path / "report.json", tmp_path / "plot.png"
    prompts.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in PROMPTS))
    printed = trimtab(
        gateway,
        *("calibrate", "--reward", reward, "--model", "adapter", "--prompts", str(prompts), "--samples", "8"),
        *("--request", json.dumps(SETTINGS), "--json", str(report), "--plot", str(plot)),
    )
    fitted = json.loads(report.read_text())
    assert fitted["id"] in printed
    assert (fitted["num_prompts"], fitted["held_out"]["num_prompts"]) == (32, 8)
    assert plot.read_bytes().startswith(b"\x89PNG")
    # 8 held-out prompts, one sample each: a good fit exceeds this in 1 of 10,000 runs.
    assert fitted["held_out"]["ks_distance"] < ks_critical(8, alpha=1e-4)

    calibration = {"method": "pooled", "calibrator": fitted["id"]}
    [value] = rewards_of(client, reward, calibration, "t50 t51 t52 t53")
    assert (value["calibration_method"], value["calibration_stale"]) == ("pooled", False)
    assert 0 < value["calibrated"] < 1
    assert value["calibration_size"] == fitted["num_rollouts"]

    with pytest.raises(ConflictError, match=r"temperature: 1.0, not 0.5"):
        rewards_of(client, reward, calibration, PROMPTS[0], temperature=0.5)
    [value] = rewards_of(client, reward, {**calibration, "allow_stale": True}, PROMPTS[0], temperature=0.5)
    assert value["calibration_stale"] is True

    # The reward is replaced by another model under the same name.
    spec = {"name": reward, "kind": "callable", "target": "demo-kindness"}
    assert http.post("/admin/rewards", json=spec).status_code == 200
    try:
        with pytest.raises(ConflictError, match="reward version"):
            rewards_of(client, reward, calibration, PROMPTS[0])
        assert "stale" in trimtab(gateway, "calibrators", "list")
    finally:
        spec = {"name": reward, "kind": "hf_classifier", "target": str(tiny_models.classifier)}
        assert http.post("/admin/rewards", json=spec).status_code == 200
    assert trimtab(gateway, "calibrators", "delete", fitted["id"]) == f"{fitted['id']} is deleted\n"
