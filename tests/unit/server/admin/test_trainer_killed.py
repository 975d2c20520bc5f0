"""A gateway and trainers that are killed: the job goes from one to the next and ends as if nothing had happened."""

import json
import logging
import multiprocessing
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from safetensors.torch import load_file

from fake_gateway import serving
from tiny_models import write_tokenizer
from trimtab_training import cli
from trimtab_training.config import parse_config
from trimtab_training.recipes.train import train
from trimtab_training.rewards import LocalScorer

pytestmark = pytest.mark.anyio

Bench = Any
STEPS = 240


def tiny_model(directory: Path, seed: int) -> str:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    write_tokenizer(directory, 64)
    return str(directory)


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"t{i} t{i + 1}"}) + "\n" for i in range(1, 20)))
    return {
        "models": {
            "base_model": tiny_model(tmp_path / "base", 1),
            "adapter": tiny_model(tmp_path / "small", 2),
        },
        "reward": {"name": "demo-kindness", "source": "local"},
        "prompts": {"type": "file", "path": str(prompts)},
        "publish": {"name": "kind"},
        "logged": {"enabled": False},
        "fresh": {"source": "local", "interval": 40, "min_pool_size": 1},
        "sampling": {"max_tokens": 4},
        "optimiser": {"batch_size": 4, "lr": 1e-3},
        "evaluation": {"share": 0.0},
        "checkpoint": {"every": 10},
        "steps": STEPS,
        "log_every": 1,
        "num_threads": 1,
    }


def start_trainer(url: str, output_dir: Path) -> multiprocessing.Process:
    """A trainer in a process of its own, forked, which saves it the imports."""

    def run() -> None:
        logging.getLogger().setLevel(logging.INFO)  # pytest's handlers keep the command from doing so
        os._exit(cli.trainer(["--url", url, "--admin-key", "admin-secret", "--output-dir", str(output_dir)]))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process  # type: ignore[return-value]


def is_beyond(attempt: int, step: int, found: dict[str, Any]) -> bool:
    return bool(found["attempt"] == attempt and found["progress"].get("step", 0) > step)


async def until(bench: Bench, job: str, reached: Any) -> dict[str, Any]:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        found: dict[str, Any] = await bench.call("GET", f"training-jobs/{job}")
        if reached(found):
            return found
        await anyio.sleep(0.02)
    raise AssertionError(f"the job never got there: {found}")


async def test_trainers_that_are_killed_pass_the_job_on_and_nothing_is_lost(
    bench: Bench, config: dict[str, Any], tmp_path: Path
) -> None:
    """Two are killed in the middle; the lease is 2 s. The third ends the job with the weights of an undisturbed run."""
    bench.jobs.lease_s = 2.0
    straight = parse_config({**config, "output_dir": str(tmp_path / "straight")})
    expected = load_file(Path(train(straight, scorer=LocalScorer.load("demo-kindness")).path) / "model.safetensors")
    trainers = []
    async with serving(bench.app) as url:
        job = str((await bench.call("POST", "training-jobs", json={"config": config}))["id"])
        try:
            for attempt, step in ((1, 30), (2, 110)):
                trainers.append(start_trainer(url, bench.directory / "jobs"))
                await until(bench, job, partial(is_beyond, attempt, step))
                os.kill(trainers[-1].pid or 0, signal.SIGKILL)
                trainers[-1].join()
            trainers.append(start_trainer(url, bench.directory / "jobs"))
            done = await until(bench, job, lambda found: found["state"] not in ("queued", "running"))
        finally:
            for trainer in trainers:
                trainer.kill()
                trainer.join()
        assert (done["state"], done["attempt"], done["error"]) == ("succeeded", 3, None)
        version = bench.directory / "jobs" / job / "versions" / done["version"]
        found = load_file(version / "model.safetensors")
        assert all(bool((found[name] == tensor).all()) for name, tensor in expected.items())
        metrics = (await bench.call("GET", f"training-jobs/{job}/metrics?tail=2000"))["data"]
        assert [line["step"] for line in metrics if "train/loss" in line["figures"]] == list(range(1, STEPS + 1))
        log = (await bench.call("GET", f"training-jobs/{job}/log?tail=2000"))["data"]
        assert {line["attempt"] for line in log} == {1, 2, 3}
        assert log[-1]["text"].endswith(f"job {job} succeeded: version {done['version']}")
