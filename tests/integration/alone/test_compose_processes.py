"""The three services of docker-compose.yml as plain processes: the same commands, the same environment.

Host names and directories of the containers are replaced by this machine's; nothing else is changed.
"""

import contextlib
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from engine_process import TINY_ENGINE_ARGS, engine_environment, free_port, stop, wait_for
from tiny_models import TinyModels

pytestmark = pytest.mark.engine

COMPOSE = Path(__file__).parents[3] / "docker-compose.yml"


def substitute(text: str, variables: Mapping[str, str]) -> str:
    """`${NAME}`, `${NAME:-default}` and `${NAME:?message}` as Compose replaces them."""

    def value(match: "re.Match[str]") -> str:
        name, operator, rest = match["name"], match["operator"], match["rest"]
        if variables.get(name):
            return variables[name]
        assert operator == ":-", f"{name} is required: {rest}"
        return rest or ""

    return re.sub(r"\$\{(?P<name>\w+)(?:(?P<operator>:[-?])(?P<rest>[^}]*))?\}", value, text)


class Services:
    """Starts services of the Compose file as processes."""

    def __init__(self, variables: Mapping[str, str], places: Mapping[str, str], logs: Path) -> None:
        self.document: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
        self.variables, self.places, self.logs = variables, places, logs

    def translate(self, text: str) -> str:
        text = substitute(text, self.variables)
        for inside, here in self.places.items():
            text = text.replace(inside, here)
        return text

    @contextlib.contextmanager
    def running(self, name: str, ready_url: str | None) -> Iterator["subprocess.Popen[bytes]"]:
        service = self.document["services"][name]
        command = shlex.split(self.translate(service["command"]))
        environment = engine_environment() | {
            key: self.translate(str(value)) for key, value in (service.get("environment") or {}).items()
        }
        log = self.logs / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "trimtab_server.cli", *command],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        try:
            if ready_url is not None:
                wait_for(ready_url, process, log)
            yield process
        finally:
            stop(process)


def training_job(models: TinyModels, gateway_url: str, output_dir: Path, prompts: Path) -> dict[str, Any]:
    """A run of a few steps: enough to draw, learn, evaluate and publish."""
    return {
        "output_dir": str(output_dir),
        "models": {"base_model": str(models.base), "adapter": str(models.adapter)},
        "gateway": {"url": gateway_url},
        "reward": {"name": "demo-kindness"},
        "prompts": {"type": "file", "path": str(prompts)},
        "fresh": {"model": str(models.base), "interval": 4, "prompts_per_round": 8, "min_pool_size": 8},
        "sampling": {"max_tokens": 8},
        "optimiser": {"batch_size": 8},
        "evaluation": {"share": 0.3, "num_resamples": 100},
        "publish": {"name": "trained", "route": "trained", "require_improvement": False},
        "steps": 6,
    }


def test_gateway_engine_and_trainer_do_a_job_together(tiny_models: TinyModels, tmp_path: Path) -> None:
    gateway_port, engine_port = free_port(), free_port()
    keys = {"TRIMTAB_API_KEY": "api-secret", "TRIMTAB_ADMIN_KEY": "admin-secret", "TRIMTAB_ENGINE_KEY": "engine-secret"}
    engine_args = " ".join(argument for argument in TINY_ENGINE_ARGS if "served-model-name" not in argument)
    variables = keys | {"TRIMTAB_MODEL": str(tiny_models.base), "TRIMTAB_ENGINE_ARGS": engine_args}
    (tmp_path / "training").mkdir()
    places = {
        "0.0.0.0 --port 8100": f"127.0.0.1 --port {engine_port}",
        "0.0.0.0 --port 8000": f"127.0.0.1 --port {gateway_port}",
        "http://engine:8100": f"http://127.0.0.1:{engine_port}",
        "http://gateway:8000": f"http://127.0.0.1:{gateway_port}",
        "--data-dir /data": f"--data-dir {tmp_path / 'data'}",
        "/training,/models": f"{tmp_path / 'training'},{tiny_models.base.parent}",
        "--output-dir /training": f"--output-dir {tmp_path / 'training'}",
    }
    gateway_url = f"http://127.0.0.1:{gateway_port}"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"t{n} t{n + 1} t3"}) + "\n" for n in range(1, 25)))
    services = Services(variables, places, tmp_path)
    with (
        services.running("engine-cpu", f"http://127.0.0.1:{engine_port}/health"),
        services.running("gateway", f"{gateway_url}/ready"),
        services.running("trainer-cpu", None) as trainer,
        httpx.Client(base_url=gateway_url, timeout=60, trust_env=False) as client,
    ):
        assert client.get("/v1/models").status_code == 401
        assert client.get("/admin/adapters").status_code == 401
        assert client.get("/admin/adapters", headers={"authorization": "Bearer api-secret"}).status_code == 401
        admin = {"authorization": "Bearer admin-secret"}
        status = httpx.get(f"http://127.0.0.1:{engine_port}/trimtab/status", trust_env=False)
        assert status.status_code == 401, "the engine's own routes want its key"

        outside = {"name": "adapter", "path": str(tmp_path)}
        assert client.post("/admin/adapters", json=outside, headers=admin).status_code == 403
        config = training_job(tiny_models, gateway_url, tmp_path / "training" / "run", prompts)
        job = client.post("/admin/training-jobs", json={"name": "tiny", "config": config}, headers=admin)
        assert job.status_code in (200, 201), job.text
        deadline = time.monotonic() + 240
        while True:
            state = client.get(f"/admin/training-jobs/{job.json()['id']}", headers=admin).json()
            if state["state"] in ("succeeded", "failed", "cancelled"):
                break
            assert trainer.poll() is None, (tmp_path / "trainer-cpu.log").read_text()[-4000:]
            assert time.monotonic() < deadline, (state, (tmp_path / "trainer-cpu.log").read_text()[-4000:])
            time.sleep(0.3)
        assert state["state"] == "succeeded", (state, (tmp_path / "trainer-cpu.log").read_text()[-4000:])
        body = {"model": "trained", "prompt": "t1 t2", "max_tokens": 4}
        answer = client.post("/v1/completions", json=body, headers={"authorization": "Bearer api-secret"})
        assert answer.status_code == 200, answer.text
        assert answer.json()["steering"]["adapters"][0]["version"] == state["version"]
