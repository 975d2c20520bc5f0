import threading
from typing import Any

import httpx
import pytest

from trimtab_adapters.contract.errors import (
    AuthenticationError,
    ConflictError,
    EngineDiedError,
    EngineError,
    EngineUnavailableError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    RewardChangedError,
    RewardError,
    RewardUnavailableError,
    StorageError,
    TrimtabError,
)
from trimtab_adapters.contract.rewards import RewardInput
from trimtab_training.interruption import Interruption, TrainingInterrupted

BODY = {"model": "m", "prompt": "t1", "n": 2, "seed": 5, "steering": {"adapters": []}}


def error(status: int, code: str | None = None, **headers: str) -> httpx.Response:
    body = {"error": {"message": "what is wrong", "type": "t", "param": "p", "code": code}}
    return httpx.Response(status, json=body, headers={key.replace("_", "-"): value for key, value in headers.items()})


def test_completions_come_back_in_order_with_token_ids(gateway: Any) -> None:
    done = []
    with gateway.client(api_key="user") as client:
        bodies = [{**BODY, "prompt": f"t{i}", "seed": 10 * i} for i in range(1, 9)]
        answers = client.complete(bodies, on_done=lambda: done.append(1))
        again = client.complete(bodies)
        (shifted,) = client.complete([{**bodies[0], "seed": 11}])
    assert answers == again
    assert [answer[0].prompt_token_ids for answer in answers] == [[i] for i in range(1, 9)]
    assert all(len(answer) == 2 and len(answer[0].token_ids) == 4 for answer in answers)
    assert answers[0][1].token_ids == shifted[0].token_ids  # candidate 1 of seed 10: by index, not as they came
    assert len(done) == 8
    key, _, body = gateway.requests[0]
    assert key == "Bearer user"
    assert body["return_token_ids"] is True
    assert body["stream"] is False


def test_the_admin_key_opens_completions_when_no_other_is_given(gateway: Any) -> None:
    with gateway.client() as client:
        client.complete([BODY])
    assert gateway.requests[0][0] == "Bearer admin"


def test_no_more_requests_are_in_flight_than_allowed(gateway: Any) -> None:
    in_flight, most, guard, full = 0, 0, threading.Lock(), threading.Event()

    def handle(request: httpx.Request) -> httpx.Response:
        nonlocal in_flight, most
        with guard:
            in_flight += 1
            most = max(most, in_flight)
            if in_flight == 3:
                full.set()
        full.wait(5)  # so that all three that may are really in flight together
        with guard:
            in_flight -= 1
        return httpx.Response(200, json={"choices": []})

    gateway.handle = handle
    with gateway.client(concurrency=3) as client:
        client.complete([BODY] * 9)
    assert most == 3


def test_a_failing_request_fails_the_call_and_stops_the_rest(gateway: Any) -> None:
    gateway.answers = [error(400)]
    with gateway.client(concurrency=1) as client, pytest.raises(InvalidRequestError, match="what is wrong"):
        client.complete([BODY] * 50)
    assert len(gateway.requests) < 50


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (error(400), InvalidRequestError),
        (error(401, "invalid_api_key"), AuthenticationError),
        (error(403), PermissionDeniedError),
        (error(404), NotFoundError),
        (error(409), ConflictError),
        (error(422), InvalidRequestError),
        (error(500), EngineError),
        (error(502, "reward_failed"), RewardError),
        (error(503, "reward_unavailable"), RewardUnavailableError),
        (error(503, "reward_changed"), RewardChangedError),
        (error(503, "engine_died"), EngineDiedError),
        (error(503), EngineUnavailableError),
        (httpx.Response(500, text="<html>"), EngineError),
        (httpx.Response(500, json=["x"]), EngineError),
        (httpx.ConnectError("refused"), EngineUnavailableError),
        (httpx.ReadTimeout("slow"), EngineUnavailableError),
    ],
)
def test_an_error_answer_is_the_exception_that_it_stands_for(
    gateway: Any, answer: Any, kind: type[TrimtabError]
) -> None:
    gateway.answers = [answer]
    with gateway.client() as client, pytest.raises(kind) as caught:
        client.score("lucky", [RewardInput("", "t7")])
    assert type(caught.value) is kind
    assert len(gateway.requests) == 1


@pytest.mark.parametrize(
    "answer",
    [
        error(503, Retry_After="0"),
        error(429, Retry_After="0"),
        httpx.ConnectError("x"),
        error(503, "engine_died", Retry_After="0"),
        error(503, "reward_unavailable", Retry_After="0"),
    ],
)
def test_a_busy_or_restarting_gateway_is_asked_again(gateway: Any, answer: Any) -> None:
    gateway.answers = [answer]
    with gateway.client(retry_for_s=30.0) as client:
        assert client.score("lucky", [RewardInput("", "t7")]).rewards == [1.0]
    assert len(gateway.requests) == 2


def test_a_wait_longer_than_allowed_is_not_begun(gateway: Any) -> None:
    gateway.answers = [error(503, Retry_After="31")]
    with gateway.client(retry_for_s=30.0) as client, pytest.raises(EngineUnavailableError):
        client.score("lucky", [RewardInput("", "t7")])


def test_a_claim_whose_answer_was_lost_is_not_sent_again(gateway: Any) -> None:
    gateway.answers = [httpx.ReadError("reset")]
    with gateway.client(retry_for_s=30.0) as client, pytest.raises(EngineUnavailableError):
        client.claim_job("w")
    assert len(gateway.requests) == 1


def test_a_stop_ends_the_wait_for_a_busy_gateway(gateway: Any) -> None:
    interruption = Interruption()
    gateway.answers = [error(503, Retry_After="200")]
    gateway.on_request = lambda path: interruption.request("cancelled")
    with gateway.client(retry_for_s=300.0, interruption=interruption) as client, pytest.raises(TrainingInterrupted):
        client.score("lucky", [RewardInput("", "t7")])


@pytest.mark.parametrize(
    "choice",
    [{}, {"index": 0, "text": "a", "prompt_token_ids": [1]}, {"index": 0, "text": "a", "token_ids": None}],
)
def test_a_completion_without_token_ids_is_an_error(gateway: Any, choice: dict[str, Any]) -> None:
    gateway.answers = [httpx.Response(200, json={"choices": [choice]})]
    with gateway.client() as client, pytest.raises(EngineError, match="lacks"):
        client.complete([BODY])


@pytest.mark.parametrize("rewards", [[1.0], [1.0, None], [1.0, "x"], None])
def test_a_missing_reward_is_an_error_and_never_zero(gateway: Any, rewards: Any) -> None:
    gateway.answers = [httpx.Response(200, json={"rewards": rewards, "version": "1"})]
    with gateway.client() as client, pytest.raises(RewardError):
        client.score("lucky", [RewardInput("", "a"), RewardInput("", "b")])


def test_an_unreadable_rollout_is_an_error(gateway: Any) -> None:
    gateway.rollouts = ['{"schema_version": 2}']
    with gateway.client() as client, pytest.raises(StorageError, match="cannot read"):
        list(client.read_rollouts({}))


def test_a_refused_export_is_the_error_that_it_stands_for(gateway: Any) -> None:
    gateway.answers = [error(403)]
    with gateway.client() as client, pytest.raises(PermissionDeniedError, match="what is wrong"):
        list(client.read_rollouts({"route": "r"}))
    assert gateway.bodies("/admin/rollouts/export") == [{"format": "jsonl", "route": "r"}]


def test_jobs_are_claimed_kept_alive_and_finished(gateway: Any) -> None:
    gateway.jobs = [{"id": "job-1", "state": "running", "config": {"steps": 3}, "attempt": 2, "lease_s": 9.0}]
    with gateway.client() as client:
        job = client.claim_job("w")
        assert job is not None
        assert (job.id, job.config, job.lease_s) == ("job-1", {"steps": 3}, 9.0)
        assert client.claim_job("w") is None
        assert client.heartbeat(job, "w", {"progress": {"step": 2}}).state == "running"
        client.release_job(job, "w")
        client.finish_job(job, "w", state="failed", error="why")
    assert gateway.heartbeats == [{"worker": "w", "attempt": 2, "progress": {"step": 2}}]
    assert gateway.released == [{"id": "job-1", "worker": "w", "attempt": 2}]
    assert gateway.finished == [{"id": "job-1", "worker": "w", "attempt": 2, "state": "failed", "error": "why"}]
