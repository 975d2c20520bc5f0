"""A whole gateway over in-memory parts, and a way to serve any ASGI application on a free port."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from trimtab_adapters.contract.errors import InvalidRequestError, NotFoundError, RewardError, StorageError
from trimtab_adapters.contract.manifest import FileEntry, Manifest
from trimtab_adapters.contract.params import AdapterWeight, SteeringRequest
from trimtab_adapters.contract.records import RewardValue, Rollout
from trimtab_adapters.contract.rewards import RewardChoice
from trimtab_server.app import GatewayParts, create_app
from trimtab_server.canary.split import takes_canary
from trimtab_server.decoding.candidates import ReferenceDraw
from trimtab_server.decoding.scoring import CalibrationChoice, PromptScorer
from trimtab_server.engine.base import Engine
from trimtab_server.engine.fake import FakeEngine
from trimtab_server.engine.residency import Residency
from trimtab_server.settings import Settings
from trimtab_server.storage.base import AdapterVersion, CanaryArm, ResolvedModel, RouteRevision

KIND = "a" * 16
"""Version of the adapter `kind`, which the route `kind` uses with alpha 1."""
PLAIN = "b" * 16
"""Version of the adapter `plain`."""


def adapter_version(name: str, version: str) -> AdapterVersion:
    entry = FileEntry(sha256="0" * 64, size_bytes=1)
    manifest = Manifest(
        name=name,
        vocabulary_sha256="0" * 64,
        vocab_size=288,
        files={"config.json": entry, "model.safetensors": entry},
    )
    return AdapterVersion(name=name, version=version, path=f"/versions/{version}", manifest=manifest, created_at=1.0)


class MemoryCatalog:
    """A `Catalog` with the base model `base`, the adapters `kind` and `plain`, and routes that tests add."""

    def __init__(self) -> None:
        self.adapters = {"kind": adapter_version("kind", KIND), "plain": adapter_version("plain", PLAIN)}
        self.revisions = {
            "kind": RouteRevision("kind", 1, (AdapterWeight(name="kind", version=KIND, alpha=1.0),), created_at=7.0)
        }

    def add_route(self, name: str, **kwargs: Any) -> None:
        self.revisions[name] = RouteRevision(name, 1, kwargs.pop("steering", ()), **kwargs)

    async def resolve(
        self, model: str, steering: SteeringRequest | None, request_id: str | None = None
    ) -> ResolvedModel:
        revision = self.revisions.get(model, RouteRevision(model, 0, ()) if model == "base" else None)
        if revision is None:
            raise NotFoundError(f"The model '{model}' does not exist", param="model", code="model_not_found")
        terms, arm = revision.steering, None
        if steering is not None and steering.adapters is not None:
            terms = tuple(self._term(choice.name, choice.version, choice.alpha) for choice in steering.adapters)
        elif (canary := revision.canary) is not None and request_id is not None:
            is_canary = takes_canary(model, revision.revision, request_id, canary.percent)
            arm = CanaryArm(revision.revision, canary.version, canary.percent, is_canary)
            terms = canary.steering if is_canary else terms
        options = revision.options.overridden_by(steering)
        return ResolvedModel(model, "base", terms, revision.best_of, revision.reward, options, arm)

    def _term(self, name: str, version: str | None, alpha: float | None) -> AdapterWeight:
        adapter = self.adapters.get(name)
        if adapter is None or version not in (None, adapter.version):
            raise NotFoundError(f"There is no adapter {name}@{version}", param="steering")
        if adapter.retired_at is not None:
            raise InvalidRequestError(f"The adapter {name} is retired", param="steering")
        return AdapterWeight(name=name, version=adapter.version, alpha=1.0 if alpha is None else alpha)

    async def version(self, version: str) -> AdapterVersion:
        for adapter in self.adapters.values():
            if adapter.version == version:
                return adapter
        raise NotFoundError(f"There is no version {version}")

    async def routes(self) -> Sequence[RouteRevision]:
        return list(self.revisions.values())

    async def active_versions(self) -> Sequence[AdapterVersion]:
        wanted = {weight.version for revision in self.revisions.values() for weight in revision.steering}
        return [a for a in self.adapters.values() if a.version in wanted or a.pinned_at is not None]

    def is_kept(self, version: str) -> bool:
        on_routes = {weight.version for revision in self.revisions.values() for weight in revision.steering}
        return version in on_routes or any(
            adapter.version == version and adapter.pinned_at is not None for adapter in self.adapters.values()
        )


@dataclass
class MemoryRolloutLog:
    """A `RolloutLog` in a list; waits for `gate` and fails on demand."""

    rollouts: list[Rollout] = field(default_factory=list)
    error: StorageError | None = None
    gate: asyncio.Event | None = None

    async def append(self, rollouts: Sequence[Rollout]) -> None:
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        self.rollouts.extend(rollouts)


@dataclass
class SimpleScoring:
    """`Scoring` with plain functions as rewards, calibrated by the share of references that score lower or equal.

    References are drawn where a size is named, and 4 of them where nothing is said; `fixed` takes the place of drawn
    ones.
    """

    rewards: dict[str, Callable[[str, str], float]] = field(default_factory=dict)
    fixed: list[float] | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)

    async def check(self, reward: RewardChoice) -> None:
        if not isinstance(reward, str) or reward not in self.rewards:
            raise NotFoundError(f"There is no reward {reward!r}", param="reward")

    async def for_prompt(
        self,
        reward: RewardChoice,
        *,
        calibration: CalibrationChoice,
        prompt: str,
        prompt_token_ids: Sequence[int],
        draw_reference: ReferenceDraw,
    ) -> PromptScorer:
        self.calls.append({"prompt": prompt, "reward": reward, "key": draw_reference.key, "size": calibration.size})
        function = self.rewards.get(reward) if isinstance(reward, str) else None
        if function is None:
            raise NotFoundError(f"There is no reward {reward!r}", param="reward")
        return SimpleScorer(str(reward), function, prompt, draw_reference, calibration.size, self.fixed)


@dataclass
class SimpleScorer:
    """The scorer of one prompt."""

    name: str
    function: Callable[[str, str], float]
    prompt: str
    draw_reference: ReferenceDraw
    size: int | None
    known: list[float] | None
    preparing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def is_calibrated(self) -> bool:
        return self.size != 0 and (self.size is not None or self.known is not None)

    @property
    def is_incremental(self) -> bool:
        return True

    async def prepare(self) -> None:
        async with self.preparing:
            await self._draw()

    async def _draw(self) -> None:
        if self.known is None and self.size:
            references = await self.draw_reference(self.size)
            self.known = [self.function(self.prompt, reference.text) for reference in references]

    async def score(self, outputs: Sequence[str]) -> list[RewardValue]:
        raw = [self.function(self.prompt, output) for output in outputs]
        await self.prepare()
        return [self._value(value, self.known if self.is_calibrated else None) for value in raw]

    def _value(self, raw: float, known: list[float] | None) -> RewardValue:
        share = sum(value <= raw for value in known) / len(known) if known else None
        return RewardValue(
            name=self.name, version="1", raw=raw, calibrated=share, calibration_size=len(known) if known else None
        )


def failing_reward(prompt: str, output: str) -> float:
    raise RewardError("the reward model is down")


@dataclass
class FakeGateway:
    """A gateway and handles on its parts."""

    app: FastAPI
    engine: FakeEngine
    catalog: MemoryCatalog
    log: MemoryRolloutLog
    scoring: SimpleScoring
    residency: Residency
    parts: GatewayParts


def build_gateway(
    *,
    fake: FakeEngine | None = None,
    engine: Engine | None = None,
    parts: dict[str, Any] | None = None,
    **settings: Any,
) -> FakeGateway:
    """A gateway over `fake`, or over `engine` (such as a `VllmEngine`) with `fake` behind it."""
    fake = fake or FakeEngine()
    catalog, log, scoring = MemoryCatalog(), MemoryRolloutLog(), SimpleScoring()
    residency = Residency(engine or fake, catalog)
    gateway_parts = GatewayParts(
        settings=Settings(model="base", **settings),
        engine=engine or fake,
        residency=residency,
        catalog=catalog,
        rollout_log=log,
        scoring=scoring,
        **(parts or {}),
    )
    return FakeGateway(create_app(gateway_parts), fake, catalog, log, scoring, residency, gateway_parts)


@asynccontextmanager
async def asgi_client(app: ASGIApp, **headers: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client without a socket. Streams arrive whole."""
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers) as client:
        yield client


@asynccontextmanager
async def serving(app: ASGIApp) -> AsyncIterator[str]:
    """The application on a free loopback port; yields its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_config=None, ws="none", lifespan="on", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    task = asyncio.create_task(server._serve([listener]))
    try:
        while not server.started:
            if task.done():
                task.result()
            await asyncio.sleep(0.005)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
        listener.close()
