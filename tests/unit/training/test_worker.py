import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from trimtab_adapters.contract.errors import RewardError
from trimtab_training.config import TrainConfig
from trimtab_training.interruption import Interruption, TrainingInterrupted
from trimtab_training.job_feed import JobFeed
from trimtab_training.recipes.train import TrainResult
from trimtab_training.worker import Recipe, Worker

CONFIG: dict[str, Any] = {
    "models": {"base_model": "base", "adapter": "adapter"},
    "reward": {"name": "r"},
    "prompts": {"type": "log"},
    "publish": {"name": "a"},
    "fresh": {"model": "base"},
    "gateway": {"url": "http://elsewhere", "concurrency": 3},
    "output_dir": "/somewhere",
}
RESULT = TrainResult("0" * 16, "/p", {"win_rate": 0.7}, is_registered=True, activated_route=None, num_steps=3)


def job(name: str = "job-1", **config: Any) -> dict[str, Any]:
    return {"id": name, "state": "running", "config": {**CONFIG, **config}, "worker": "w", "created_at": 1.0}


def worker(client: Any, tmp_path: Path, recipe: Recipe, heartbeat_s: float = 0.01) -> Worker:
    return Worker(
        client,
        name="w",
        url="http://gateway",
        output_dir=tmp_path,
        recipe=recipe,
        heartbeat_s=heartbeat_s,
        poll_s=0.01,
    )


def wait_for_stop(config: TrainConfig, interruption: Interruption, feed: JobFeed) -> TrainResult:
    feed({"step": 1})
    interruption.wait(30.0)
    raise AssertionError("nobody asked for a stop")


def test_a_job_runs_in_its_own_directory_against_the_workers_gateway(gateway: Any, tmp_path: Path) -> None:
    gateway.jobs = [job()]
    seen: list[TrainConfig] = []

    def recipe(config: TrainConfig, interruption: Interruption, feed: JobFeed) -> TrainResult:
        seen.append(config)
        return RESULT

    with gateway.client() as client:
        worker(client, tmp_path, recipe).run(once=True)
    assert seen[0].output_dir == tmp_path / "job-1"
    assert seen[0].gateway is not None
    assert (seen[0].gateway.url, seen[0].gateway.concurrency) == ("http://gateway", 3)
    assert gateway.finished == [
        {"id": "job-1", "worker": "w", "state": "succeeded", "version": "0" * 16, "evaluation": {"win_rate": 0.7}}
    ]


@pytest.mark.parametrize(
    ("error", "message"), [(RewardError("it is down"), "it is down"), (KeyError("x"), "KeyError: 'x'")]
)
def test_a_failing_job_is_reported_and_the_next_one_runs(
    gateway: Any, tmp_path: Path, error: Exception, message: str
) -> None:
    gateway.jobs = [job("job-1"), job("job-2")]

    def recipe(config: TrainConfig, interruption: Interruption, feed: JobFeed) -> TrainResult:
        if config.output_dir.name == "job-1":
            raise error
        working.stop()
        return RESULT

    with gateway.client() as client:
        working = worker(client, tmp_path, recipe)
        working.run()
    assert [(end["id"], end["state"], end.get("error")) for end in gateway.finished] == [
        ("job-1", "failed", message),
        ("job-2", "succeeded", None),
    ]


@pytest.mark.parametrize("change", [{"steps": 0}, {"gateway": 3}, {"unknown": 1}])
def test_a_bad_configuration_fails_the_job_with_its_reason(
    gateway: Any, tmp_path: Path, change: dict[str, Any]
) -> None:
    gateway.jobs = [job(**change)]
    with gateway.client() as client:
        worker(client, tmp_path, wait_for_stop).run(once=True)
    assert gateway.finished[0]["state"] == "failed"
    assert "configuration is not valid" in gateway.finished[0]["error"]


def test_progress_travels_with_the_heartbeats_and_a_cancel_stops_the_job(gateway: Any, tmp_path: Path) -> None:
    gateway.jobs = [job()]

    def cancel_when_told(path: str) -> None:
        if any(beat["progress"] == {"step": 1} for beat in gateway.heartbeats):
            gateway.job_state = "cancelled"

    gateway.on_request = cancel_when_told
    with gateway.client() as client:
        worker(client, tmp_path, wait_for_stop).run(once=True)
    assert (gateway.finished, gateway.released) == ([], [])  # the gateway ended it itself


def test_a_job_that_another_worker_has_is_dropped_without_a_report(gateway: Any, tmp_path: Path) -> None:
    gateway.jobs = [job()]
    reasons: list[str] = []

    def lose(path: str) -> None:
        if path.endswith("heartbeat"):
            gateway.answers = [httpx.Response(409, json={"error": {"message": "another worker has it"}})]

    def recipe(config: TrainConfig, interruption: Interruption, feed: JobFeed) -> TrainResult:
        try:
            return wait_for_stop(config, interruption, feed)
        except TrainingInterrupted as exc:
            reasons.append(exc.reason)
            raise

    gateway.on_request = lose
    with gateway.client() as client:
        worker(client, tmp_path, recipe).run(once=True)
    assert reasons == ["lost"]
    assert (gateway.finished, gateway.released) == ([], [])


def test_a_heartbeat_that_fails_does_not_stop_the_job(gateway: Any, tmp_path: Path) -> None:
    gateway.jobs = [job()]
    beats = threading.Semaphore(0)

    def fail(path: str) -> None:
        if path.endswith("heartbeat"):
            gateway.answers = [httpx.Response(503, json={"error": {"message": "restarting"}})]
            beats.release()

    def recipe(config: TrainConfig, interruption: Interruption, feed: JobFeed) -> TrainResult:
        for _ in range(3):
            assert beats.acquire(timeout=30)
        interruption.check()
        return RESULT

    gateway.on_request = fail
    with gateway.client() as client:
        worker(client, tmp_path, recipe).run(once=True)
    assert gateway.finished[0]["state"] == "succeeded"


def test_a_stop_interrupts_the_job_and_ends_the_worker(gateway: Any, tmp_path: Path) -> None:
    gateway.jobs = [job("job-1"), job("job-2")]
    reasons: list[str] = []

    def recipe(config: TrainConfig, interruption: Interruption, feed: JobFeed) -> TrainResult:
        working.stop()
        try:
            interruption.check()
        except TrainingInterrupted as exc:
            reasons.append(exc.reason)
            raise
        return RESULT

    with gateway.client() as client:
        working = worker(client, tmp_path, recipe)
        working.run()
    assert reasons == ["released"]
    assert gateway.finished == []
    assert gateway.released == [{"id": "job-1", "worker": "w"}]
    assert [waiting["id"] for waiting in gateway.jobs] == ["job-2"]


def test_without_a_job_once_returns_at_once(gateway: Any, tmp_path: Path) -> None:
    with gateway.client() as client:
        worker(client, tmp_path, wait_for_stop).run(once=True)
    assert len(gateway.requests) == 1


def test_log_lines_and_metrics_travel_with_the_heartbeats_to_the_last(gateway: Any, tmp_path: Path) -> None:
    gateway.jobs = [{**job(), "attempt": 3}]

    def recipe(config: TrainConfig, interruption: Interruption, feed: JobFeed) -> TrainResult:
        feed.metrics.add({"step": 5, "time": 1.5, "train/loss": 0.25})
        raise RewardError("the reward is down")

    with gateway.client() as client:
        worker(client, tmp_path, recipe, heartbeat_s=600.0).run(once=True)
    assert {beat["attempt"] for beat in gateway.heartbeats} == {3}
    metrics = [line for beat in gateway.heartbeats for line in beat.get("metrics", ())]
    assert metrics == [{"number": 1, "step": 5, "time": 1.5, "figures": {"train/loss": 0.25}}]
    told = [line["text"] for beat in gateway.heartbeats for line in beat.get("log", ())]
    assert told[-1].endswith("job job-1 failed: the reward is down")
    assert (tmp_path / "job-1/job.log").read_text().splitlines() == told
    assert gateway.finished == [
        {"id": "job-1", "worker": "w", "attempt": 3, "state": "failed", "error": "the reward is down"}
    ]


def test_news_that_the_gateway_refuses_are_not_sent_again_and_do_not_cost_the_lease(
    gateway: Any, tmp_path: Path
) -> None:
    gateway.jobs = [job()]
    refused: list[Any] = []
    accepted = threading.Semaphore(0)

    def refuse(path: str) -> None:
        if path.endswith("heartbeat"):
            body = gateway.requests[-1][2]
            if body.get("metrics") and not refused:
                refused.append(body)
                gateway.answers = [httpx.Response(400, json={"error": {"message": "too many figures"}})]
            elif refused:
                assert "metrics" not in body
                accepted.release()

    def recipe(config: TrainConfig, interruption: Interruption, feed: JobFeed) -> TrainResult:
        feed.metrics.add({"step": 5, "time": 1.5})
        assert accepted.acquire(timeout=30)
        interruption.check()
        return RESULT

    gateway.on_request = refuse
    with gateway.client() as client:
        worker(client, tmp_path, recipe).run(once=True)
    assert len(refused) == 1
    assert gateway.finished[0]["state"] == "succeeded"


def test_a_worker_that_is_not_heard_of_for_a_lease_stops_by_itself(gateway: Any, tmp_path: Path) -> None:
    """Its lease is 1 s; the gateway fails every heartbeat, so at 0.9 s it must stop, and it reports nothing."""
    gateway.jobs = [{**job(), "lease_s": 1.0}]
    stops: list[tuple[str, float]] = []

    def fail(path: str) -> None:
        if path.endswith("heartbeat"):
            gateway.answers = [httpx.Response(503, json={"error": {"message": "restarting"}})]

    def recipe(config: TrainConfig, interruption: Interruption, feed: JobFeed) -> TrainResult:
        began = time.monotonic()
        while True:
            time.sleep(0.01)
            try:
                interruption.check()
            except TrainingInterrupted as exc:
                stops.append((exc.reason, time.monotonic() - began))
                raise

    gateway.on_request = fail
    with gateway.client() as client:
        worker(client, tmp_path, recipe).run(once=True)
    ((reason, after_s),) = stops
    assert reason == "lost"
    assert 0.1 < after_s < 6.0  # of the 0.9 s the claim took some; a busy machine wakes late
    assert (gateway.finished, gateway.released) == ([], [])


def test_a_job_without_a_place_for_its_files_fails(gateway: Any, tmp_path: Path) -> None:
    gateway.jobs = [job()]
    (tmp_path / "job-1").touch()
    with gateway.client() as client:
        worker(client, tmp_path, wait_for_stop).run(once=True)
    assert gateway.finished[0]["state"] == "failed"
    assert "cannot be written" in gateway.finished[0]["error"]


def test_a_message_that_is_too_long_is_cut_so_that_the_end_is_taken(gateway: Any, tmp_path: Path) -> None:
    gateway.jobs = [job()]

    def recipe(config: TrainConfig, interruption: Interruption, feed: JobFeed) -> TrainResult:
        raise RewardError("x" * 50_000)

    with gateway.client() as client:
        worker(client, tmp_path, recipe).run(once=True)
    assert gateway.finished[0]["error"] == "x" * 20_000
