"""A gateway over the fake engine on a free port, with rewards that need no model."""

import asyncio
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from fake_gateway import FakeGateway, build_gateway, serving
from trimtab_adapters.contract.errors import NotFoundError
from trimtab_adapters.contract.rewards import RewardInput
from trimtab_server.api.admin.rewards import build_rewards_router
from trimtab_server.rewards.attempts import Scored


def noise(prompt: str, output: str) -> float:
    """Uniform on [0, 1), another number for every text: a reward without ties."""
    return int.from_bytes(hashlib.sha256(f"{prompt}\0{output}".encode()).digest()[:6], "big") / 2**48


def letters(prompt: str, output: str) -> float:
    """A whole number, with many ties."""
    return float(len(output))


@dataclass
class FunctionReward:
    """A function behind a queue of its own."""

    function: Callable[[str, str], float]
    version: str = "1"
    num_scored: int = 0
    error: Exception | None = None

    async def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        if self.error is not None:
            raise self.error
        self.num_scored += len(inputs)
        return [self.function(item.prompt, item.output) for item in inputs]

    async def scored(self, inputs: Sequence[RewardInput]) -> Scored:
        return Scored(self.version, await self.score(inputs))


class FunctionRewards:
    """A registry of functions."""

    def __init__(self) -> None:
        self.by_name = {"noise": FunctionReward(noise), "letters": FunctionReward(letters)}

    async def batched(self, name: str) -> FunctionReward:
        if name not in self.by_name:
            raise NotFoundError(f"the reward {name!r} does not exist", param="reward", code="reward_not_found")
        return self.by_name[name]

    async def resolve(self, choice: Any) -> Any:
        return await self.batched(str(choice))

    async def list(self) -> Any:
        raise NotImplementedError

    async def report(self, name: str) -> Any:
        raise NotImplementedError

    async def add(self, spec: Any) -> Any:
        raise NotImplementedError

    async def remove(self, name: str) -> Any:
        raise NotImplementedError


@dataclass
class Bench:
    """The gateway's address and handles on what is behind it."""

    url: str
    gateway: FakeGateway
    rewards: FunctionRewards
    bodies: list[dict[str, Any]]
    """Of the completion requests, in the order of their arrival."""
    answers: list[Response] = field(default_factory=list)
    """Given instead of the gateway's, one for each completion request, while there are any."""
    on_completion: Callable[[int], None] = lambda number: None
    """Called with the number of completion requests so far."""

    def completions(self) -> list[dict[str, Any]]:
        """The requests that drew samples: all but the first of each policy, which asks what it is."""
        return [body for body in self.bodies if "steering_logprobs" in body]


class Watched:
    """Notes the completion requests on their way to the gateway."""

    def __init__(self, app: ASGIApp, bench: Bench) -> None:
        self.app, self.bench = app, bench

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or "completions" not in scope["path"]:
            await self.app(scope, receive, send)
            return
        body = await Request(scope, receive).body()
        self.bench.bodies.append(json.loads(body))
        self.bench.on_completion(len(self.bench.bodies))
        if self.bench.answers:
            await self.bench.answers.pop(0)(scope, receive, send)
            return
        first = True

        async def again() -> Any:
            nonlocal first
            if first:
                first = False
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        await self.app(scope, again, send)


@contextmanager
def evaluation_bench() -> Iterator[Bench]:
    """A gateway with the model `base` and the route `kind`, in a thread."""
    rewards = FunctionRewards()
    router = APIRouter()
    router.include_router(build_rewards_router(rewards))
    gateway = build_gateway(parts={"routers": [router]})
    gateway.scoring.rewards.update({"noise": noise, "letters": letters})
    made = Bench("", gateway, rewards, [])
    started, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        async with serving(Watched(gateway.app, made)) as url:
            made.url = url
            started.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    started.wait(30)
    try:
        yield made
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        loop.close()


def busy() -> Response:
    """What a gateway says while its engine starts."""
    body = {"error": {"message": "no engine is ready", "type": "server_error", "param": None, "code": "x"}}
    return JSONResponse(body, status_code=503, headers={"retry-after": "0"})
