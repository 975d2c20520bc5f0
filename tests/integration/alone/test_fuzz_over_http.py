"""Random clients, streams that are closed, and versions that come and go, before a real engine that is short of room.

`FUZZ_SECONDS=600 make test TESTS=tests/integration/alone/test_fuzz_over_http.py` searches longer and with a fresh seed;
`FUZZ_SEED=N` asks the same again.
"""

import asyncio
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from answer_reference import AnswerReference, Expert
from engine_process import engine
from gateway_process import RunningGateway, running_gateway
from http_fuzz import HttpFuzz
from tiny_models import NUM_TOKENS, TinyModels, write_manifest
from trimtab_adapters.contract.manifest import read_manifest

DEFAULT_SECONDS = 30.0
FUZZ_SECONDS = float(os.environ.get("FUZZ_SECONDS", DEFAULT_SECONDS))
NUM_CLIENTS = 12
BLOCK_BYTES = 2 * 2 * 16 * 2 * 32 * 4
"""Keys and values of 16 tokens in float32: two layers with two heads of 32."""
NUM_BLOCKS = 24
"""Of the adapter LMs: more than the longest row, so that none fails, and so few that rows take each other's."""

pytestmark = [pytest.mark.engine, pytest.mark.timeout(FUZZ_SECONDS + 300)]


@pytest.fixture(scope="module")
def cramped_engine(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """19 blocks of 32 tokens for the base, 64 tokens a step, and a small cache for the adapter LMs."""
    arguments = ("--num-gpu-blocks-override=20", f"--adapter-kv-bytes={NUM_BLOCKS * BLOCK_BYTES}")
    with engine(tiny_models.base, tmp_path_factory.mktemp("cramped") / "engine.log", *arguments) as url:
        yield url


@pytest.fixture(scope="module")
def cramped_gateway(
    cramped_engine: str, tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningGateway]:
    with running_gateway(
        tmp_path_factory.mktemp("cramped-gateway"),
        *("--engine-url", cramped_engine),
        *("--adapter", f"adapter={tiny_models.adapter}", "--adapter", f"other={tiny_models.other}"),
    ) as started:
        yield started


@pytest.fixture
def passing(tiny_models: TinyModels, tmp_path: Path) -> dict[str, Path]:
    """Three versions with the weights of `other` and control tokens of their own."""
    versions: dict[str, Path] = {}
    for token in (NUM_TOKENS + 3, NUM_TOKENS + 5, NUM_TOKENS + 6):
        directory = Path(shutil.copytree(tiny_models.other, tmp_path / f"life-{token}"))
        versions[write_manifest(directory, "life", prefix=[token, 9]).version_id] = directory
    return versions


async def settled_status(engine_client: httpx.AsyncClient, gateway: httpx.AsyncClient) -> dict[str, Any]:
    """The engine's status once nothing is in flight. A row is let go in the step after its request has ended."""
    body = {"model": "base", "prompt": [1], "max_tokens": 2}
    for _ in range(100):
        (await gateway.post("/v1/completions", json=body)).raise_for_status()
        status: dict[str, Any] = (await engine_client.get("/trimtab/status")).json()
        if not any(version["active_rows"] for version in status["versions"]):
            return status
        await asyncio.sleep(0.1)
    raise AssertionError(f"rows are still open: {status}")


async def preemptions(engine_client: httpx.AsyncClient) -> float:
    lines = (await engine_client.get("/metrics")).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:num_preemptions_total{"))


def expert_in(directory: Path) -> Expert:
    return Expert(str(directory), tuple(read_manifest(directory).prefix_token_ids))


def test_the_trial_of_guidance_at_start_leaves_nothing_behind(cramped_engine: str) -> None:
    status = httpx.get(f"{cramped_engine}/trimtab/status", trust_env=False).json()
    assert status["can_guide"] is True
    assert status["cache"]["allocated_bytes"] == 0, "else adapters might not find room in a small cache"
    assert status["failed_rows"] == 0


def test_whatever_clients_do_each_answer_is_the_plain_loops(
    cramped_engine: str, cramped_gateway: RunningGateway, tiny_models: TinyModels, passing: dict[str, Path]
) -> None:
    given = os.environ.get("FUZZ_SEED")
    seed = int(given) if given else 1 if FUZZ_SECONDS == DEFAULT_SECONDS else random.randrange(1 << 32)
    print(f"FUZZ_SEED={seed}")  # noqa: T201 - shown with a failure, or with -s
    fixed = {name: tiny_models.manifest(name).version_id for name in ("adapter", "other")}

    async def scenario() -> tuple[HttpFuzz, dict[str, Any], list[Any]]:
        limits = httpx.Limits(max_connections=None)
        async with (
            httpx.AsyncClient(base_url=cramped_gateway.url, timeout=120, limits=limits, trust_env=False) as gateway,
            httpx.AsyncClient(base_url=cramped_engine, timeout=120, trust_env=False) as engine_client,
        ):
            fuzz = HttpFuzz(gateway, seed, fixed, passing)
            await fuzz.run(FUZZ_SECONDS, NUM_CLIENTS)
            status = await settled_status(engine_client, gateway)
            fuzz.events["preempted"] = int(await preemptions(engine_client))
            left: list[Any] = []
            for uids in (fuzz.finished_uids, fuzz.aborted_uids):
                for start in range(0, len(uids), 1000):
                    body = {"starts": dict.fromkeys(uids[start : start + 1000], 0)}
                    reply = await engine_client.post("/trimtab/records/read", json=body)
                    left += [record["uid"] for record in reply.json()["records"]]
            return fuzz, status, left

    fuzz, status, left = asyncio.run(scenario())
    fuzz.events["steered tokens computed again"] = status["cache"]["recomputed_tokens"]
    print(dict(sorted(fuzz.events.items())))  # noqa: T201 - as above
    print({key: status[key] for key in ("steered_rows", "steered_steps", "failed_rows", "cache")})  # noqa: T201
    assert (status["failed_rows"], status["cache"]["used_blocks"]) == (0, 0)
    assert {version["state"] for version in status["versions"]} == {"committed"}
    assert not set(left) & set(fuzz.finished_uids), "records that nobody took"
    directories = {fixed["adapter"]: tiny_models.adapter, fixed["other"]: tiny_models.other, **passing}
    experts = {version: expert_in(directory) for version, directory in directories.items()}
    reference = AnswerReference(str(tiny_models.base), experts)
    reference.check(fuzz.answers)
    print(f"{reference.num_tokens} tokens, {reference.num_ties} ties")  # noqa: T201
    assert reference.num_ties < 1e-3 * reference.num_tokens
    missed = {event for event, count in fuzz.events.items() if count == 0}
    assert not missed, "the search never met these"
