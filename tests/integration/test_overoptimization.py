"""Gold against proxy from rollouts that a real engine drew: the curve is that of every subset of the logged samples."""

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

import pytest

from gateway_process import RunningGateway
from tiny_models import TinyModels

pytestmark = pytest.mark.engine

NUM_PROMPTS, NUM_SAMPLES = 24, 8


def test_the_guards_curve_is_that_of_all_subsets_of_the_logged_samples(
    gateway: RunningGateway, tiny_models: TinyModels, tmp_path: Path
) -> None:
    since = time.time()
    spec = {"kind": "hf_classifier", "target": str(tiny_models.classifier)}
    with gateway.client() as client:
        client.post("/admin/rewards", json={**spec, "name": "guard-proxy"}).raise_for_status()
        gold = {**spec, "name": "guard-gold", "options": {"template": "prompt_output"}}
        client.post("/admin/rewards", json=gold).raise_for_status()
        drawn: dict[str, list[str]] = {}
        for number in range(NUM_PROMPTS):
            prompt = f"t{3 + number} t9 t{40 + number}"
            body = {"model": "base", "prompt": prompt, "max_tokens": 5, "n": NUM_SAMPLES, "ignore_eos": True}
            choices = client.post("/v1/completions", json=body).raise_for_status().json()["choices"]
            drawn[prompt] = [choice["text"] for choice in choices]
        scores = {
            name: [
                client.post(
                    f"/admin/rewards/{name}/score",
                    json={"inputs": [{"prompt": prompt, "output": output} for output in outputs]},
                )
                .raise_for_status()
                .json()["rewards"]
                for prompt, outputs in drawn.items()
            ]
            for name in ("guard-proxy", "guard-gold")
        }
    plot = tmp_path / "curve.png"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "trimtab_server.cli", "rewards", "overoptimization"),
            *("--proxy", "guard-proxy", "--gold", "guard-gold", "--since", str(since)),
            *("--plot", str(plot), "--json", "--url", gateway.url),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    cap = json.loads(done.stdout)
    assert (cap["num_prompts"], cap["num_samples"]) == (NUM_PROMPTS, NUM_PROMPTS * NUM_SAMPLES)
    assert plot.read_bytes().startswith(b"\x89PNG")
    for point in cap["curve"]:
        if point["n"] in (1, 2, 3, 8):
            per_prompt = [
                best_of(point["n"], proxy, gold)
                for proxy, gold in zip(scores["guard-proxy"], scores["guard-gold"], strict=True)
            ]
            assert point["gold"] == pytest.approx(fmean(per_prompt), rel=1e-4, abs=1e-6)
    assert {1, 2, 3, 8} <= {point["n"] for point in cap["curve"]}


def best_of(n: int, proxy: list[float], gold: list[float]) -> float:
    """Mean gold of the best by proxy over all subsets of n; equal proxies share."""
    found = []
    for subset in itertools.combinations(range(len(proxy)), n):
        best = max(proxy[i] for i in subset)
        found.append(fmean(gold[i] for i in subset if proxy[i] == best))
    return fmean(found)
