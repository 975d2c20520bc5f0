"""`POST /v1/feedback` over HTTP, on answers of a gateway with a real log."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fake_gateway import FakeGateway, asgi_client, build_gateway
from trimtab_adapters.contract.rollout_filter import RolloutFilter
from trimtab_server.api.feedback import build_feedback_router
from trimtab_server.storage.database import Database
from trimtab_server.storage.feedback import SqlFeedback
from trimtab_server.storage.rollout_log import SpooledRolloutLog
from trimtab_server.storage.rollouts import SqlRolloutReader

pytestmark = pytest.mark.anyio


class Bench:
    """A gateway whose log is a database, and a client."""

    def __init__(self, gateway: FakeGateway, client: httpx.AsyncClient, database: Database, log: Any) -> None:
        self.gateway, self.client, self.database, self.log = gateway, client, database, log

    async def complete(self, headers: dict[str, str] | None = None, **body: Any) -> dict[str, Any]:
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        prompt = {} if "messages" in body else {"prompt": "Hi"}
        whole = {"model": "kind", "max_tokens": 3, **prompt, **body}
        response = await self.client.post(path, json=whole, headers=headers or {})
        assert response.status_code == 200, response.text
        return dict(response.json())

    async def give(self, expected: int = 200, **body: Any) -> dict[str, Any]:
        response = await self.client.post("/v1/feedback", json=body)
        assert response.status_code == expected, response.text
        return dict(response.json())

    async def refused(self, status: int, **body: Any) -> dict[str, Any]:
        answer = await self.give(status, **body)
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        return dict(answer["error"])

    async def logged(self) -> dict[str, list[float | None]]:
        """Ratings by output text, without reference rollouts."""
        await self.log.flush()
        reader, where = SqlRolloutReader(self.database), RolloutFilter(steered=True)
        return {r.output_text: [f.rating for f in r.feedback] async for r in reader.read(where)}


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    database = Database(f"sqlite:///{tmp_path / 'trimtab.db'}")
    database.migrate()
    log = SpooledRolloutLog(database, tmp_path / "spool", linger_s=60.0)
    await log.start()
    router = build_feedback_router(SqlFeedback(database, log.flush))
    gateway = build_gateway(parts={"routers": [router]}, api_keys=("secret",))
    gateway.parts.rollout_log = log
    async with asgi_client(gateway.app, authorization="Bearer secret") as client:
        yield Bench(gateway, client, database, log)
    await log.aclose()
    database.close()


async def test_each_choice_of_an_answer_can_be_rated_right_after_it(bench: Bench) -> None:
    """The best of 6 are returned, out of the order of their generation; the log is only written when it is asked."""
    bench.gateway.scoring.rewards["last"] = lambda prompt, output: float(ord(output[-1]) if output else 0)
    answer = await bench.complete(n=3, best_of=6, reward="last", seed=4, temperature=2.0, prompt=["Hi", "Ho"])
    texts = {choice["index"]: choice["text"] for choice in answer["choices"]}
    assert len(set(texts.values())) == 6
    for index in texts:
        given = await bench.give(completion_id=answer["id"], index=index, rating=index / 10)
        assert (given["object"], given["completion_id"], given["index"]) == ("feedback", answer["id"], index)
        assert given["rating"] == index / 10
    logged = await bench.logged()
    assert {text: ratings for text, ratings in logged.items() if ratings} == {
        text: [index / 10] for index, text in texts.items()
    }
    assert len(logged) == 12


async def test_thumbs_are_the_ends_of_the_scale_and_nulls_mean_nothing(bench: Bench) -> None:
    answer = await bench.complete(messages=[{"role": "user", "content": "Hi"}])
    about = {"completion_id": answer["id"], "request_id": None, "comment": None, "rating": None}
    assert (await bench.give(**about, thumbs="up"))["rating"] == 1.0
    assert (await bench.give(**about, thumbs="down", user="ann"))["rating"] == -1.0
    assert sorted((await bench.logged()).values()) == [[1.0, -1.0]]


async def test_an_answer_is_also_named_by_the_callers_request_id(bench: Bench) -> None:
    answer = await bench.complete(headers={"x-request-id": "trace-1"}, n=2)
    given = await bench.give(request_id="trace-1", index=1, preferred_index=0, comment="the other was better")
    assert (given["completion_id"], given["preferred_index"]) == (answer["id"], 0)
    assert given["comment"] == "the other was better"


async def test_streamed_choices_can_be_rated(bench: Bench) -> None:
    body = {"model": "kind", "prompt": "Hi", "max_tokens": 3, "n": 2, "stream": True}
    text = (await bench.client.post("/v1/completions", json=body)).text
    completion_id = text.split('"id":"')[1].split('"')[0]
    assert (await bench.give(completion_id=completion_id, index=1, thumbs="up"))["index"] == 1


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"rating": 1.0}, "completion_id"),
        ({"completion_id": "c", "request_id": "r", "rating": 1.0}, "completion_id"),
        ({"completion_id": "c"}, "rating"),
        ({"completion_id": "c", "rating": 1.1}, "rating"),
        ({"completion_id": "c", "rating": -1.1}, "rating"),
        ({"completion_id": "c", "rating": "1"}, "rating"),
        ({"completion_id": "c", "rating": 1, "thumbs": "up"}, "thumbs"),
        ({"completion_id": "c", "thumbs": "sideways"}, "thumbs"),
        ({"completion_id": "c", "thumbs": "up", "index": -1}, "index"),
        ({"completion_id": "c", "thumbs": "up", "user": "nul\x00"}, "user"),
        ({"completion_id": "c", "thumbs": "up", "user": ""}, "user"),
        ({"completion_id": "nul\x00", "thumbs": "up"}, "completion_id"),
        ({"completion_id": "c", "comment": "x" * 10_001}, "comment"),
        ({"completion_id": "c", "thumbs": "up", "surprise": 1}, "surprise"),
    ],
)
async def test_a_bad_body_is_refused(bench: Bench, body: dict[str, Any], param: str) -> None:
    error = await bench.refused(400, **body)
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


async def test_an_unknown_answer_is_not_found(bench: Bench) -> None:
    answer = await bench.complete()
    for about in ({"completion_id": "cmpl-none"}, {"completion_id": answer["id"], "index": 1}):
        assert (await bench.refused(404, **about, thumbs="up"))["code"] == "completion_not_found"


async def test_feedback_needs_the_key_that_answers_need(bench: Bench) -> None:
    headers = {"authorization": "Bearer wrong"}
    response = await bench.client.post("/v1/feedback", json={"completion_id": "c", "thumbs": "up"}, headers=headers)
    assert response.status_code == 401
