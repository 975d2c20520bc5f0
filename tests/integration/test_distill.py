"""`trimtab distill` from a real engine: what the teacher told is the base's, and the student comes closer to it."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_client import TwoModelReference
from gateway_process import RunningGateway
from tiny_models import TinyModels, write_llama, write_tokenizer

pytestmark = pytest.mark.engine


@pytest.fixture
def student(tmp_path: Path) -> Path:
    write_llama(tmp_path / "small", seed=11, num_layers=1, width=32)
    write_tokenizer(tmp_path / "small")
    return tmp_path / "small"


def distilled(directory: Path, student: Path, teacher: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fidelity that the command leaves beside the student."""
    prompts = directory / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"t{i} t{i + 1} t{2 * i}"}) + "\n" for i in range(1, 49)))
    config = directory / "distill.toml"
    config.write_text(
        f"""
output_dir = "{directory / "run"}"
student = "{student}"
num_per_prompt = 8
steps = 80
held_out_share = 0.25
num_threads = 1
top_logprobs = {settings["top_logprobs"]}
[teacher]
type = "api"
url = "{teacher}"
model = "base"
[prompts]
path = "{prompts}"
[sampling]
max_tokens = 6
[optimiser]
batch_size = 32
lr = 1e-2
"""
    )
    command = [sys.executable, "-m", "trimtab_server.cli", "distill", "--config", str(config)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    (found,) = directory.glob("run/**/fidelity.json")
    told: dict[str, Any] = json.loads(found.read_text())
    assert f"{told['log_ratio']:.4f}" in ended.stdout, "the command prints what it stores"
    return told


@pytest.mark.parametrize(("behind", "top_logprobs"), [("gateway", 0), ("engine", 5)])
def test_a_student_of_a_served_base(
    gateway: RunningGateway,
    engine_url: str,
    tiny_models: TinyModels,
    student: Path,
    tmp_path: Path,
    behind: str,
    top_logprobs: int,
) -> None:
    """Through the gateway by likelihood of its samples; from a plain vLLM server by the distributions that it tells.

    Tested: the 95 % intervals of the fidelity before and after do not touch.
    """
    teacher = gateway.url if behind == "gateway" else engine_url
    told = distilled(tmp_path, student, teacher, {"top_logprobs": top_logprobs})
    assert told["interval"][1] < told["before"]["interval"][0]
    assert told["objective"] == ("token" if top_logprobs else "sequence")
    reference = TwoModelReference(tiny_models)
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 48 * 8
    for row in rows[:40]:
        output = row["output_token_ids"]
        base = reference.logprobs("base", row["prompt_token_ids"], output)[:-1]
        chosen = base.gather(1, torch.tensor(output)[:, None])[:, 0]
        assert row["logprobs"] == pytest.approx(chosen.tolist(), abs=1e-3)
        if top_logprobs:
            # vLLM tells the sampled token besides, where it is not among the most probable ones.
            for token, told_ids, best in zip(
                output, row["top_token_ids"], base.topk(top_logprobs).indices, strict=True
            ):
                assert set(told_ids) == {token, *best.tolist()}
