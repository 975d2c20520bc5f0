"""`/admin/rollouts`, `/admin/training-jobs`, `/admin/rewards` and `/admin/engines` over HTTP."""

import io
import json
from typing import Any

import pyarrow.parquet as pq
import pytest

from trimtab_adapters.contract.errors import EngineUnavailableError
from trimtab_adapters.contract.records import RewardValue, Rollout

pytestmark = pytest.mark.anyio

Bench = Any


def rollout(rollout_id: str, created_at: float, **changes: Any) -> Rollout:
    fields: dict[str, Any] = {
        "id": rollout_id,
        "request_id": "req",
        "created_at": created_at,
        "duration_s": 0.5,
        "route": "nice",
        "base_model": "base",
        "endpoint": "completions",
        "prompt_token_ids": [1],
        "output_text": "x",
        "output_token_ids": [2],
        "steering": [],
    }
    return Rollout.model_validate({**fields, **changes})


async def test_the_log_is_read_page_by_page_with_what_was_just_acknowledged(bench: Bench) -> None:
    await bench.log.append([rollout(f"r{number}", float(number)) for number in range(5)])
    seen, cursor = [], None
    while True:
        query = {"limit": 2, **({"cursor": cursor} if cursor else {})}
        page = await bench.call("GET", "rollouts", params=query)
        seen += [item["id"] for item in page["data"]]
        cursor = page["next_cursor"]
        assert page["has_more"] == (cursor is not None)
        if cursor is None:
            break
    assert seen == ["r0", "r1", "r2", "r3", "r4"]


async def test_numbers_and_texts_that_json_lacks_are_still_an_answer(bench: Bench) -> None:
    await bench.log.append([rollout("a", 1.0, base_logprobs=[float("-inf")], output_text="half \ud83d")])
    [item] = (await bench.call("GET", "rollouts"))["data"]
    assert item["base_logprobs"] == [None]
    assert item["output_text"] == "half \ud83d"


async def test_filters_reach_the_log(bench: Bench) -> None:
    reward = RewardValue(name="kindness", version="1", raw=0.5, calibrated=0.25)
    await bench.log.append(
        [
            rollout("a", 1.0),
            rollout("b", 2.0, route="other", chosen=False, rewards=[reward]),
            rollout("c", 3.0, endpoint="reference"),
        ]
    )
    for query, expected in (
        ({"route": "nice"}, ["a", "c"]),
        ({"since": 2}, ["b", "c"]),
        ({"until": 2}, ["a"]),
        ({"endpoint": "reference"}, ["c"]),
        ({"chosen_only": "true"}, ["a", "c"]),
        ({"adapter": "kind"}, []),
        ({"base_model": "base", "steered": "false", "has_feedback": "false"}, ["a", "b", "c"]),
        ({"steered": "true"}, []),
        ({"has_feedback": "true"}, []),
        ({"request_id": "req"}, ["a", "b", "c"]),
        ({"reward": "kindness", "min_reward": 0.5, "max_calibrated": 0.25}, ["b"]),
        ({"reward": "kindness", "min_reward": 0.5, "max_calibrated": 0.25, "whole_requests": "true"}, ["a", "b", "c"]),
    ):
        assert [item["id"] for item in (await bench.call("GET", "rollouts", params=query))["data"]] == expected


@pytest.mark.parametrize(
    "query",
    [
        {"limit": 0},
        {"limit": 1001},
        {"limit": "x"},
        {"since": "nan"},
        {"endpoint": "embeddings"},
        {"cursor": "made-up"},
        {"surprise": 1},
        {"min_reward": 0.5},
        {"min_rating": 2},
        {"max_calibrated": 1.5, "reward": "kindness"},
        {"steered": "perhaps"},
        {"route": "nul\x00"},
    ],
)
async def test_a_bad_query_is_refused(bench: Bench, query: dict[str, Any]) -> None:
    assert (await bench.refused("GET", "rollouts", 400, params=query))["type"] == "invalid_request_error"


async def test_an_export_is_a_file_of_the_log(bench: Bench) -> None:
    rollouts = [rollout(f"r{number:03}", float(number)) for number in range(130)]
    await bench.log.append(rollouts)
    lines = (await bench.client.get("/admin/rollouts/export")).content.splitlines()
    assert [Rollout.model_validate(json.loads(line)) for line in lines] == rollouts
    response = await bench.client.get("/admin/rollouts/export", params={"format": "parquet", "limit": 3})
    assert response.headers["content-type"] == "application/vnd.apache.parquet"
    assert 'filename="rollouts.parquet"' in response.headers["content-disposition"]
    assert pq.read_table(io.BytesIO(response.content)).column("id").to_pylist() == ["r000", "r001", "r002"]
    await bench.refused("GET", "rollouts/export", 400, params={"format": "csv"})


async def test_a_training_job_goes_from_submission_to_its_end(bench: Bench) -> None:
    submitted = await bench.call("POST", "training-jobs", json={"config": {"steps": 2}, "name": "first"})
    assert (submitted["state"], submitted["config"], submitted["name"]) == ("queued", {"steps": 2}, "first")
    path = f"training-jobs/{submitted['id']}"
    claimed = await bench.call("POST", "training-jobs/claim", json={"worker": "w:1"})
    assert (claimed["id"], claimed["state"], claimed["worker"]) == (submitted["id"], "running", "w:1")
    assert await bench.call("POST", "training-jobs/claim", 204, json={"worker": "w:2"}) is None
    beat = await bench.call("POST", f"{path}/heartbeat", json={"worker": "w:1", "progress": {"step": 1}})
    assert beat["progress"] == {"step": 1}
    await bench.refused("POST", f"{path}/heartbeat", 409, json={"worker": "w:2"})
    end = {"worker": "w:1", "state": "succeeded", "version": "a" * 16, "evaluation": {"kl": 0.5}}
    done = await bench.call("POST", f"{path}/finish", json=end)
    assert (done["state"], done["version"], done["evaluation"]) == ("succeeded", "a" * 16, {"kl": 0.5})
    assert await bench.call("GET", path) == done
    assert (await bench.call("GET", "training-jobs", params={"state": "succeeded"}))["data"] == [done]
    await bench.refused("POST", f"{path}/cancel", 409)


async def test_a_waiting_job_can_be_cancelled(bench: Bench) -> None:
    job = await bench.call("POST", "training-jobs", json={"config": {"steps": 2}})
    assert (await bench.call("POST", f"training-jobs/{job['id']}/cancel"))["state"] == "cancelled"
    await bench.call("POST", "training-jobs/claim", 204, json={"worker": "w"})


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("training-jobs", {}),
        ("training-jobs", {"config": {}}),
        ("training-jobs", {"config": [1]}),
        ("training-jobs", {"config": {"a": "x" * (1 << 20)}}),
        ("training-jobs", {"config": {"a": 1}, "surprise": 1}),
        ("training-jobs/claim", {}),
        ("training-jobs/claim", {"worker": ""}),
        ("training-jobs/x/finish", {"worker": "w", "state": "running"}),
        ("training-jobs/x/finish", {"worker": "w", "state": "failed", "version": "../x"}),
        ("training-jobs/x/heartbeat", {"worker": "w", "progress": 1}),
    ],
)
async def test_a_bad_job_call_is_refused(bench: Bench, path: str, body: dict[str, Any]) -> None:
    assert (await bench.refused("POST", path, 400, json=body))["type"] == "invalid_request_error"
    assert (await bench.call("GET", "training-jobs"))["data"] == []


async def test_an_unknown_job_is_not_found(bench: Bench) -> None:
    assert (await bench.refused("GET", "training-jobs/x", 404))["code"] == "job_not_found"
    await bench.refused("GET", "training-jobs", 400, params={"state": "asleep"})


async def test_texts_are_scored_in_pieces_with_the_rewards_version(bench: Bench) -> None:
    inputs = [{"prompt": "p", "output": "x" * number} for number in range(130)]
    answer = await bench.call("POST", "rewards/length/score", json={"inputs": inputs})
    assert answer == {"name": "length", "version": "7", "rewards": [float(number) for number in range(130)]}
    assert bench.rewards.reward.batches == [64, 64, 2]


async def test_bad_scoring_calls_are_refused(bench: Bench) -> None:
    await bench.refused("POST", "rewards/nothing/score", 404, json={"inputs": [{"prompt": "p", "output": "o"}]})
    bodies: list[dict[str, Any]] = [
        {},
        {"inputs": []},
        {"inputs": [{"prompt": "p"}]},
        {"inputs": [{"prompt": "p", "output": 1}]},
    ]
    for body in bodies:
        await bench.refused("POST", "rewards/length/score", 400, json=body)


async def test_rewards_are_added_and_listed(bench: Bench) -> None:
    spec = {"name": "long", "kind": "callable", "target": "length", "options": {"scale": 2}}
    assert await bench.call("POST", "rewards", json=spec) == {**spec, "version": "7"}
    assert [item["name"] for item in (await bench.call("GET", "rewards"))["data"]] == ["length", "long"]
    assert (await bench.refused("POST", "rewards", 400, json={**spec, "target": "nowhere"}))["param"] == "target"
    await bench.refused("POST", "rewards", 400, json={**spec, "kind": "magic"})


async def test_engines_are_listed_also_when_they_are_away(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    [engine] = (await bench.call("GET", "engines"))["data"]
    assert engine["is_available"] is True
    assert engine["status"]["vocab_size"] > 0

    async def away() -> None:
        raise EngineUnavailableError("restarting")

    monkeypatch.setattr(bench.fake_engine, "status", away)
    [engine] = (await bench.call("GET", "engines"))["data"]
    assert (engine["is_available"], engine["status"], engine["error"]) == (False, None, "restarting")
