"""Random clients and a restless administrator before a real gateway. What they ask is a function of a seed."""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from answer_reference import Answer
from tiny_models import NUM_TOKENS

ALPHAS = (1.0, -0.5, 0.3, 2.0, -1.0, 0.7)
SWAPPED, LIFE = "swapped", "life"
"""Routes: one whose adapter is exchanged all the time, one whose versions are registered and retired all the time."""


@dataclass
class HttpFuzz:
    """What was asked, and what came of it.

    Args:
        client: Of the gateway.
        seed: Decides what each client asks, one after the other; not how requests of several clients interleave.
        fixed: Adapters that stay, name -> version.
        passing: Version directories that come and go on the route `life`, version -> directory.
    """

    client: httpx.AsyncClient
    seed: int
    fixed: Mapping[str, str]
    passing: Mapping[str, Path]
    answers: list[Answer] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)
    finished_uids: list[str] = field(default_factory=list)
    aborted_uids: list[str] = field(default_factory=list)
    _is_over: bool = False

    async def run(self, seconds: float, num_clients: int) -> None:
        """Until the time is over and the last answer is there. Raises whatever a client met."""
        await self._activate(next(iter(self.fixed)))
        await self._register(next(iter(self.passing)))
        deadline = time.monotonic() + seconds
        async with asyncio.TaskGroup() as tasks:
            for number in range(num_clients):
                tasks.create_task(self._client(number))
            tasks.create_task(self._administrator())
            while time.monotonic() < deadline:
                await asyncio.sleep(0.05)
            self._is_over = True

    # Clients

    async def _client(self, number: int) -> None:
        rng = random.Random(f"{self.seed}-{number}")
        count = 0
        while not self._is_over:
            await asyncio.sleep(rng.choice([0.0, 0.0, 0.02, 0.3]))
            body = self._body(rng)
            name = f"request {count} of client {number}, seed {self.seed}: {json.dumps(body)}"
            breaks_off_after = rng.randrange(1, 12) if body["stream"] and rng.random() < 0.5 else None
            count += 1
            try:
                if body["stream"]:
                    await self._stream(name, body, breaks_off_after)
                else:
                    await self._whole(name, body)
            except Exception as exc:
                exc.add_note(name)
                raise

    def _body(self, rng: random.Random) -> dict[str, Any]:
        """A greedy request."""
        shared = [3, 5, 7] * 30 if rng.random() < 0.2 else []
        prompt = shared[: rng.randrange(90)] + [rng.randrange(1, NUM_TOKENS) for _ in range(rng.choice([1, 3, 17, 70]))]
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": rng.randrange(1, 60), "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True, "stream": rng.random() < 0.4}
        body |= {"n": rng.choice([1, 1, 1, 2, 3]), "steering_logprobs": rng.random() < 0.6}
        if not body["stream"] and rng.random() < 0.3:
            body["best_of"] = body["n"] + rng.randrange(3)
        kind = rng.random()
        body["model"] = "base" if kind < 0.7 else SWAPPED if kind < 0.85 else LIFE
        if kind < 0.5:
            names = rng.sample(sorted(self.fixed), rng.randrange(1, len(self.fixed) + 1))
            body["steering"] = {"adapters": [{"name": name, "alpha": rng.choice(ALPHAS)} for name in names]}
        return body

    async def _whole(self, name: str, body: dict[str, Any]) -> None:
        response = await self.client.post("/v1/completions", json=body)
        data = response.json()
        assert response.status_code == 200, data
        terms = self._terms(body, data)
        for choice in data["choices"]:
            self._keep(name, body, choice["token_ids"], terms, choice.get("steering_logprobs"))
        assert len(data["choices"]) == body["n"]
        self.events["best_of"] += "best_of" in body
        self._ended(data["id"], body, terms)

    async def _stream(self, name: str, body: dict[str, Any], breaks_off_after: int | None) -> None:
        tokens: dict[int, list[int]] = {index: [] for index in range(body["n"])}
        records: dict[int, dict[str, Any]] = {}
        terms: list[tuple[str, float]] = []
        number = 0
        async with self.client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200, await response.aread()
            async with aclosing(_chunks(response)) as chunks:
                async for chunk in chunks:
                    assert "error" not in chunk, chunk
                    terms = terms or self._terms(body, chunk)
                    for choice in chunk["choices"]:
                        tokens[choice["index"]] += choice["token_ids"]
                        if "steering_logprobs" in choice:
                            records[choice["index"]] = choice["steering_logprobs"]
                    number += 1
                    if number == breaks_off_after:
                        self.events["closed in the middle"] += 1
                        if terms:
                            self.aborted_uids += [f"{chunk['id']}-0-{index}" for index in tokens]
                        return
        for index, listed in tokens.items():
            self._keep(name, body, listed, terms, records.get(index))
        self.events["streamed"] += 1
        self._ended(chunk["id"], body, terms)

    def _terms(self, body: dict[str, Any], data: dict[str, Any]) -> list[tuple[str, float]]:
        """What steered the answer, as it reports itself; it must be what was asked for."""
        said = data.get("steering", {"adapters": []})["adapters"]
        if "steering" in body:
            asked = [(self.fixed[term["name"]], term["alpha"]) for term in body["steering"]["adapters"]]
            assert [(term["version"], term["alpha"]) for term in said] == asked
        else:
            allowed = {SWAPPED: set(self.fixed.values()), LIFE: set(self.passing), "base": set()}[body["model"]]
            assert {term["version"] for term in said} <= allowed
            assert len(said) == (body["model"] != "base")
        return [(term["version"], term["alpha"]) for term in said]

    def _keep(
        self,
        name: str,
        body: dict[str, Any],
        tokens: list[int],
        terms: list[tuple[str, float]],
        record: dict[str, Any] | None,
    ) -> None:
        assert len(tokens) == body["max_tokens"]
        assert (record is not None) == body["steering_logprobs"]
        self.answers.append(Answer(name, body["prompt"], tokens, terms, record))

    def _ended(self, job: str, body: dict[str, Any], terms: Sequence[tuple[str, float]]) -> None:
        if terms:
            num_candidates = max(body["n"], body.get("best_of", 0))
            self.finished_uids += [f"{job}-0-{number}" for number in range(num_candidates)]
        self.events["finished"] += 1
        self.events["several choices"] += body["n"] > 1
        self.events["steered by several"] += len(terms) > 1
        self.events["unsteered"] += not terms
        self.events["read in chunks"] += len(body["prompt"]) > 64

    # The administrator

    async def _administrator(self) -> None:
        rng = random.Random(f"{self.seed}-administrator")
        while not self._is_over:
            await asyncio.sleep(rng.choice([0.05, 0.2, 0.6]))
            if rng.random() < 0.6:
                await self._activate(rng.choice(sorted(self.fixed)))
                self.events["swapped"] += 1
            else:
                await self._register(rng.choice(sorted(self.passing)))

    async def _activate(self, adapter: str) -> None:
        answer = await self.client.post(f"/admin/routes/{SWAPPED}/activate", json={"adapter": adapter})
        assert answer.status_code == 200, answer.text

    async def _register(self, version: str) -> None:
        """Make a version the one of the route `life`, and retire the others."""
        body = {"name": LIFE, "path": str(self.passing[version].resolve()), "route": LIFE}
        answer = await self.client.post("/admin/adapters", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["version"] == version
        self.events["registered"] += 1
        for listed in (await self.client.get(f"/admin/adapters/{LIFE}")).json()["data"]:
            if listed["version"] != version and listed["retired_at"] is None:
                path = f"/admin/adapters/{LIFE}/versions/{listed['version']}/retire"
                answer = await self.client.post(path)
                assert answer.status_code == 200, answer.text
                self.events["retired"] += 1


async def _chunks(response: httpx.Response) -> AsyncGenerator[Any, None]:
    """The events of a stream before `[DONE]`, which must come."""
    async for line in response.aiter_lines():
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            yield json.loads(line[6:])
    raise AssertionError("the stream ended without [DONE]")
