"""The client against the real gateway application, its storage and admin API; only the engine's model is a fake."""

import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import trimtab_client as trimtab
from fake_gateway import serving
from trimtab_adapters.contract.manifest import FileEntry, Manifest
from trimtab_client import AsyncClient
from trimtab_client.types import PromptMessage, Steering
from trimtab_server.app import create_app
from trimtab_server.engine.fake import FakeEngine
from trimtab_server.engine.fake_app import fake_vllm_app
from trimtab_server.serve import build_parts
from trimtab_server.settings import Settings

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[AsyncClient]:
    async with serving(fake_vllm_app(FakeEngine())) as engine_url:
        settings = Settings(data_dir=tmp_path / "data", engine_urls=(engine_url,), calibration_size=4)
        async with (
            serving(create_app(await build_parts(settings))) as url,
            AsyncClient(url, max_retries=0) as client,
        ):
            yield client


async def version_directory(directory: Path) -> Path:
    """A version directory for the fake engine's vocabulary."""
    status = await FakeEngine().status()
    directory.mkdir()
    (directory / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512})
    )
    save_file({"weight": np.zeros((2, 2), dtype=np.float32)}, directory / "model.safetensors")
    files = {
        path.name: FileEntry(sha256=hashlib.sha256(path.read_bytes()).hexdigest(), size_bytes=path.stat().st_size)
        for path in directory.iterdir()
    }
    manifest = Manifest(
        name="kind", vocabulary_sha256=status.vocabulary_sha256, vocab_size=status.num_tokens, files=files
    )
    (directory / "manifest.json").write_bytes(manifest.canonical_json())
    return directory


async def test_adapters_and_routes_from_registration_to_retirement(client: AsyncClient, tmp_path: Path) -> None:
    admin = client.admin
    added = await admin.adapters.add(name="kind", path=str(await version_directory(tmp_path / "kind")), route="kind")
    assert added.extra == {"object": "adapter.version"}
    assert (added.name, added.routes, added.manifest["name"]) == ("kind", ["kind"], "kind")
    assert (added.residency["state"], added.pinned_at) == ("resident", None)
    assert await admin.adapters.list() == await admin.adapters.get("kind") == [added]
    assert (await admin.adapters.pin(name="kind", version=added.version)).pinned_at is not None
    await admin.adapters.unpin(name="kind", version=added.version)
    assert await admin.adapters.get("kind") == [added]

    assert {model.id for model in await client.models.list()} == {"base", "kind"}
    assert (await client.models.get("kind")).id == "kind"

    second = await admin.adapters.activate(route="kind", adapter="kind", alpha=0.5, comment="softer")
    assert (second.revision, second.steering[0].version, second.steering[0].alpha) == (2, added.version, 0.5)
    assert (second.comment, await admin.routes.get("kind")) == ("softer", second)
    back = await admin.adapters.rollback(route="kind")
    assert (back.revision, back.steering[0].alpha) == (3, 1.0)
    assert {revision.revision for revision in await admin.routes.history("kind")} == {1, 2, 3}

    put = await admin.routes.put("both", adapters=[{"name": "kind", "alpha": -1.0}], best_of=4, comment="away")
    assert (put.best_of, put.steering[0].alpha, put.extra) == (4, -1.0, {"object": "route"})
    assert {route.route for route in await admin.routes.list()} == {"kind", "both"}

    with pytest.raises(trimtab.ConflictError):
        await admin.adapters.retire(name="kind", version=added.version)
    await admin.routes.delete("both")
    await admin.routes.delete("kind")
    retired = await admin.adapters.retire(name="kind", version=added.version)
    assert retired.retired_at is not None


async def test_completions_are_steered_ranked_logged_and_exported(client: AsyncClient, tmp_path: Path) -> None:
    path = str(await version_directory(tmp_path / "kind"))
    version = (await client.admin.adapters.add(name="kind", path=path)).version
    rewards = {reward.name: reward for reward in await client.admin.rewards.list()}
    assert rewards["demo-kindness"].kind == "callable"
    completion = await client.completions.create(
        model="base",
        prompt="The baker",
        max_tokens=4,
        n=2,
        best_of=3,
        reward="demo-kindness",
        steering={"adapters": [{"name": "kind"}]},
    )
    assert completion.steering is not None
    assert [(term.name, term.version, term.alpha) for term in completion.steering.adapters] == [("kind", version, 1.0)]
    selections = [choice.selection for choice in completion.choices]
    assert [(s.rank, s.num_candidates) for s in selections if s is not None] == [(0, 3), (1, 3)]
    reward = selections[0].reward if selections[0] is not None else None
    assert reward is not None
    assert (reward.name, reward.calibration_size) == ("demo-kindness", 4)

    page = await client.admin.rollouts.list(endpoint="completions", limit=2)
    assert (len(page.data), page.has_more) == (2, True)
    rest = await client.admin.rollouts.list(endpoint="completions", cursor=str(page.next_cursor))
    assert (len(rest.data), rest.has_more, rest.next_cursor) == (1, False, None)
    size = await client.admin.rollouts.export(tmp_path / "log.jsonl", endpoint="completions", chosen_only=True)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert size == (tmp_path / "log.jsonl").stat().st_size
    assert [json.loads(line)["chosen"] for line in lines] == [True, True]
    await client.admin.rollouts.export(tmp_path / "log.parquet", format="parquet")
    assert (tmp_path / "log.parquet").read_bytes()[:4] == b"PAR1"


async def test_feedback_is_kept_and_exported_with_the_answer(client: AsyncClient, tmp_path: Path) -> None:
    completion = await client.completions.create(model="base", prompt="The baker", max_tokens=4, n=2)
    first = await client.feedback.create(completion_id=completion.id, index=1, thumbs="up", user="ann")
    assert (first.completion_id, first.index, first.rating, first.user) == (completion.id, 1, 1.0, "ann")
    assert first.extra == {"object": "feedback"}
    again = await client.feedback.create(
        completion_id=completion.id, index=1, rating=-0.5, comment="on second thought", preferred_index=0, user="ann"
    )
    assert (again.rating, again.comment, again.preferred_index) == (-0.5, "on second thought", 0)
    assert again.updated_at >= again.created_at == first.created_at
    with pytest.raises(trimtab.NotFoundError):
        await client.feedback.create(request_id="never-sent", thumbs="down")
    await client.admin.rollouts.export(tmp_path / "log.jsonl", has_feedback=True, max_rating=0.0)
    (rollout,) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert (rollout["output_text"], rollout["choice_index"]) == (completion.choices[1].text, 1)
    assert [said["rating"] for said in rollout["feedback"]] == [-0.5]
    page = await client.admin.rollouts.list(request_id=completion.id, has_feedback=True, whole_requests=True)
    assert [found["choice_index"] for found in page.data] == [0, 1]


async def test_operators_and_explanations(client: AsyncClient, tmp_path: Path) -> None:
    path = str(await version_directory(tmp_path / "kind"))
    version = (await client.admin.adapters.add(name="kind", path=path)).version
    put = await client.admin.routes.put(
        "careful", adapters=[{"name": "kind"}], operators={"schedule": {"first": 2}, "max_kl": 0.5}
    )
    assert put.operators == {"schedule": {"start": 0, "first": 2, "decay": 1.0}, "max_kl": 0.5}
    steering: Steering = {
        "plausibility": 0.1,
        "max_kl": None,
        "negative_prompt": "Rude",
        "guidance_scale": 2.0,
        "explain": 3,
    }
    completion = await client.completions.create(
        model="careful", prompt="The baker", max_tokens=3, seed=1, steering=steering
    )
    applied = completion.steering
    assert applied is not None
    assert (applied.plausibility, applied.max_kl, applied.guidance_scale, applied.extra) == (0.1, None, 2.0, {})
    assert applied.schedule is not None
    assert applied.schedule.first == 2
    explained = completion.choices[0].explain
    assert explained is not None
    assert "".join(token.token for token in explained.tokens) == completion.choices[0].text
    first, _, last = explained.tokens
    assert (first.adapters[0].version, first.negative is None, first.extra) == (version, False, {})
    assert (last.adapters[0].logprob, last.negative) == (None, None)
    assert (len(first.before), len(first.after), first.before[1].steered) == (3, 3, None)
    async with client.completions.stream(
        model="careful", prompt="The baker", max_tokens=3, seed=1, steering=steering
    ) as chunks:
        pieces = [choice.explain async for chunk in chunks for choice in chunk.choices]
    assert [token for piece in pieces if piece is not None for token in piece.tokens] == explained.tokens
    messages = [{"role": "user", "content": "Hello"}]
    negative: Steering = {"negative_prompt": [PromptMessage(role="user", content="Rude")], "explain": True}
    chat = await client.chat.create(model="base", messages=messages, max_tokens=2, steering=negative)
    assert chat.choices[0].explain is not None
    assert [len(token.before) for token in chat.choices[0].explain.tokens] == [5, 5]
    (rollout,) = (await client.admin.rollouts.list(endpoint="chat.completions")).data
    assert rollout["sampling"]["guidance"]["scale"] == 1.5
    with pytest.raises(trimtab.BadRequestError) as bad:
        await client.completions.create(model="base", prompt="p", steering={"guidance_scale": 2.0})
    assert bad.value.param == "steering.guidance_scale"


async def test_streams_and_chat(client: AsyncClient) -> None:
    async with client.completions.stream(model="base", prompt="The baker", max_tokens=5) as chunks:
        received = [chunk async for chunk in chunks]
    assert received[-1].usage is not None
    assert received[-1].usage.completion_tokens == 5
    text = "".join(choice.text for chunk in received for choice in chunk.choices)
    messages = [{"role": "user", "content": "Hello"}]
    async with client.chat.stream(model="base", messages=messages, max_tokens=5) as pieces:
        streamed = "".join([c.delta.content or "" async for chunk in pieces for c in chunk.choices])
    chat = await client.chat.create(model="base", messages=messages, max_tokens=5)
    assert text
    assert streamed == chat.choices[0].message.content


async def test_rewards_jobs_and_engines(client: AsyncClient) -> None:
    admin = client.admin
    added = await admin.rewards.add(name="mine", kind="callable", target="demo-kindness")
    assert (added.name, added.target, added.version is not None) == ("mine", "demo-kindness", True)
    scored = await admin.rewards.score("mine", [{"prompt": "p", "output": "thank you"}, {"prompt": "p", "output": ""}])
    assert (scored.name, scored.version, len(scored.rewards)) == ("mine", added.version, 2)

    job = await admin.training_jobs.create({"steps": 5}, name="first")
    assert (job.state, job.config, job.name) == ("queued", {"steps": 5}, "first")
    assert await admin.training_jobs.list("queued") == [job]
    assert (await admin.training_jobs.cancel(job.id)).state == "cancelled"
    assert (await admin.training_jobs.get(job.id)).state == "cancelled"

    (engine,) = await admin.engines.list()
    assert (engine.is_available, engine.error) == (True, None)
    assert engine.status is not None
    assert engine.status["model"] == "base"


async def test_refusals_carry_the_gateways_error_object(client: AsyncClient, tmp_path: Path) -> None:
    with pytest.raises(trimtab.NotFoundError) as unknown:
        await client.completions.create(model="nobody", prompt="p")
    assert (unknown.value.param, unknown.value.code) == ("model", "model_not_found")
    assert unknown.value.request_id
    with pytest.raises(trimtab.BadRequestError) as bad:
        await client.completions.create(model="base", prompt="p", temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(trimtab.BadRequestError):
        await client.admin.adapters.add(name="kind", path=str(tmp_path / "nothing"))


async def test_the_keys_open_what_they_should(tmp_path: Path) -> None:
    async with serving(fake_vllm_app(FakeEngine())) as engine_url:
        settings = Settings(
            data_dir=tmp_path / "data", engine_urls=(engine_url,), api_keys=("api",), admin_keys=("admin",)
        )
        async with serving(create_app(await build_parts(settings))) as url:
            async with AsyncClient(url) as nobody, AsyncClient(url, api_key="api", admin_key="admin") as both:
                with pytest.raises(trimtab.AuthenticationError):
                    await nobody.models.list()
                assert [model.id for model in await both.models.list()] == ["base"]
                assert await both.admin.adapters.list() == []
            async with AsyncClient(url, api_key="api") as user:
                with pytest.raises(trimtab.AuthenticationError):
                    await user.admin.adapters.list()
