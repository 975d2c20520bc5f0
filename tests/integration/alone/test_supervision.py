"""`trimtab serve` with its engine as a child: deaths, restarts, refusals and a clean stop."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from engine_process import ENGINE, TINY_ENGINE_ARGS, engine_environment, free_port, stop, wait_for
from gateway_process import RunningGateway, running_gateway, serve_command
from tiny_models import TinyModels

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def supervised(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    arguments = ("--model", str(tiny_models.base), "--adapter", f"adapter={tiny_models.adapter}")
    with running_gateway(tmp_path_factory.mktemp("serve"), *arguments, engine_args=TINY_ENGINE_ARGS) as started:
        yield started


def engine_processes(gateway_pid: int) -> list[psutil.Process]:
    """The supervised engine's API server and everything below it."""
    children = psutil.Process(gateway_pid).children()
    (leader,) = [
        child
        for child in children
        if "trimtab_adapters.vllm.launch" in " ".join(child.cmdline()) or "engine" in child.cmdline()
    ]
    return [leader, *leader.children(recursive=True)]


def events(response: httpx.Response) -> Iterator[Any]:
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield line[6:] if line == "data: [DONE]" else json.loads(line[6:])


def test_an_engine_that_stood_still_for_a_while_answers_what_was_sent_meanwhile(supervised: RunningGateway) -> None:
    """vLLM's server drops idle connections after 5 s, and its event loop looks at its clock before it looks at what has
    come in: after a stall it used to close a connection on which a request was waiting."""
    body = {"model": "adapter", "prompt": "t1 t2", "max_tokens": 1}
    leader = engine_processes(supervised.pid)[0]
    with supervised.client() as client:
        for _ in range(40):  # an idle connection in most of the gateway's pools
            client.post("/v1/completions", json=body).raise_for_status()
        leader.send_signal(signal.SIGSTOP)
        try:
            with ThreadPoolExecutor(16) as pool:
                answers = [pool.submit(client.post, "/v1/completions", json=body) for _ in range(16)]
                time.sleep(6)
                leader.send_signal(signal.SIGCONT)
                assert [answer.result().status_code for answer in answers] == [200] * 16
        finally:
            leader.send_signal(signal.SIGCONT)


def test_a_killed_engine_is_an_error_event_then_503_then_service_again(supervised: RunningGateway) -> None:
    body = {"model": "adapter", "prompt": "t1 t2", "max_tokens": 240, "ignore_eos": True, "stream": True, "n": 8}
    with supervised.client() as client:
        seen: list[Any] = []
        with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            stream = events(response)
            while len({choice["index"] for event in seen for choice in event["choices"]}) < 8:
                seen.append(next(stream))
            for process in engine_processes(supervised.pid):
                process.send_signal(signal.SIGKILL)
            seen += list(stream)
        errors = [event["error"] for event in seen if isinstance(event, dict) and "error" in event]
        assert len(errors) == 1
        assert errors[0]["code"] == "engine_died"
        assert "data: [DONE]" not in seen
        assert "[DONE]" not in seen

        refused = client.post("/v1/completions", json={"model": "adapter", "prompt": "t1", "max_tokens": 2})
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        # For a moment the dying engine still takes connections.
        assert refused.json()["error"]["code"] in ("engine_unavailable", "engine_died")
        assert client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 200

        deadline = time.monotonic() + 180
        while client.get("/ready").status_code != 200:
            assert time.monotonic() < deadline, supervised.log.read_text()[-3000:]
            time.sleep(0.2)
        answer = client.post("/v1/completions", json={"model": "adapter", "prompt": "t1", "max_tokens": 2})
        assert answer.status_code == 200, "the adapter is loaded again into the new engine"
        assert answer.json()["steering"]["adapters"][0]["name"] == "adapter"


def test_sigterm_stops_everything_and_a_restart_restores_the_routes(tiny_models: TinyModels, tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    arguments = ("--model", str(tiny_models.base), "--adapter", f"adapter={tiny_models.adapter}")
    command = serve_command(port, tmp_path / "data", *arguments, engine_args=TINY_ENGINE_ARGS)
    url = f"http://127.0.0.1:{port}"
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=engine_environment(), start_new_session=True
            )
        try:
            wait_for(f"{url}/ready", process, log)
            models = {model["id"]: model for model in httpx.get(f"{url}/v1/models").json()["data"]}
            if signal_number == signal.SIGTERM:
                body = {"adapter": "adapter", "alpha": 0.25}
                httpx.post(f"{url}/admin/routes/adapter/activate", json=body, timeout=60).raise_for_status()
            else:
                (term,) = models["adapter"]["steering"]["adapters"]
                assert term["alpha"] == 0.25, "the route is as it was left, not as the command line began it"
            family = engine_processes(process.pid)
            assert len(family) >= 3, "API server, engine core and worker"
            process.send_signal(signal_number)
            assert process.wait(60) in (0, -signal_number, 128 + signal_number), log.read_text()[-2000:]
            _, alive = psutil.wait_procs(family, timeout=10)
            assert alive == []
        finally:
            stop(process)


def test_a_killed_gateway_leaves_no_engine_and_loses_no_acknowledged_rollout(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    port, log, data = free_port(), tmp_path / "log", tmp_path / "data"
    arguments = ("--model", str(tiny_models.base), "--adapter", f"adapter={tiny_models.adapter}")
    command = serve_command(port, data, *arguments, engine_args=TINY_ENGINE_ARGS)
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=engine_environment(), start_new_session=True
        )
    acknowledged: list[str] = []
    try:
        wait_for(f"{url}/ready", process, log)
        with httpx.Client(base_url=url, timeout=60) as client:
            for number in range(20):
                headers = {"x-request-id": f"kill-{number}"}
                body = {"model": "adapter", "prompt": "t1 t2", "max_tokens": 2, "n": 2}
                client.post("/v1/completions", json=body, headers=headers).raise_for_status()
                acknowledged.append(headers["x-request-id"])
        family = engine_processes(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        _, alive = psutil.wait_procs(family, timeout=60)
        assert alive == [], "the engine ends with the gateway that started it"
    finally:
        stop(process)
    # A second gateway over the same data, without an engine, finds them all.
    unreachable = ("--engine-url", f"http://127.0.0.1:{free_port()}")
    second = serve_command(port, data, "--model", "base", *unreachable)
    with log.open("wb") as output:
        process = subprocess.Popen(
            second, stdout=output, stderr=subprocess.STDOUT, env=engine_environment(), start_new_session=True
        )
    try:
        wait_for(f"{url}/health", process, log)
        lines = httpx.get(f"{url}/admin/rollouts/export", params={"format": "jsonl"}, timeout=60).text.splitlines()
        logged = [json.loads(line)["metadata"]["x_request_id"] for line in lines]
        assert sorted(logged) == sorted(acknowledged * 2)
    finally:
        stop(process)


def test_an_engine_that_could_not_steer_says_why_and_does_not_start(tiny_models: TinyModels) -> None:
    speculative = '{"method": "ngram", "num_speculative_tokens": 2}'
    done = subprocess.run(
        [*ENGINE, f"--model={tiny_models.base}", "--speculative-config", speculative],
        capture_output=True,
        text=True,
        timeout=120,
        env=engine_environment(),
        check=False,
    )
    assert done.returncode == 2
    assert "Remove --speculative-config" in done.stderr.splitlines()[-1]
