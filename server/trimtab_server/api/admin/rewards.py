"""`/admin/rewards`: register rewards, look at them, and score texts with them."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Depends
from pydantic import Field
from starlette.responses import Response

from trimtab_adapters.contract.errors import RewardChangedError
from trimtab_adapters.contract.rewards import RewardChoice, RewardInput, RewardSpec
from trimtab_server.api.admin.json_io import Body, JsonAnswer, body_of, list_answer
from trimtab_server.rewards.attempts import Scored
from trimtab_server.rewards.registry import RewardReport

logger = logging.getLogger(__name__)

MAX_INPUTS = 4096
_CHUNK = 64


class RewardScorer(Protocol):
    """A reward behind its queue."""

    @property
    def version(self) -> str:
        """Changes whenever scores could change."""
        ...

    async def scored(self, inputs: Sequence[RewardInput]) -> Scored:
        """One finite number per input, and their version. Raises `RewardError`."""
        ...


class Rewards(Protocol):
    """What these routes need of the reward registry."""

    async def batched(self, name: str) -> RewardScorer:
        """Raises `NotFoundError`, `InvalidRequestError` for a composite, or `RewardError`."""
        ...

    async def resolve(self, choice: RewardChoice) -> object:
        """Raises `NotFoundError`, `InvalidRequestError` or `RewardError`."""
        ...

    async def list(self) -> Sequence[RewardSpec]:
        """All rewards that can be named."""
        ...

    async def report(self, name: str) -> RewardReport:
        """What is known of one. Raises `NotFoundError`."""
        ...

    async def add(self, spec: RewardSpec) -> str:
        """Build and register a reward; its version. Raises `InvalidRequestError`."""
        ...

    async def remove(self, name: str) -> None:
        """Raises `NotFoundError` or `ConflictError`."""
        ...


class Judged(Body):
    """One text and the prompt that it answers."""

    prompt: str
    output: str


class Score(Body):
    """Body of `POST /admin/rewards/{name}/score`."""

    inputs: list[Judged] = Field(min_length=1, max_length=MAX_INPUTS)


def build_rewards_router(rewards: Rewards) -> APIRouter:
    """Routes for rewards."""
    router = APIRouter(prefix="/admin/rewards")

    @router.get("")
    async def list_all() -> JsonAnswer:
        return list_answer(await rewards.list())

    @router.post("")
    async def add(spec: Annotated[RewardSpec, Depends(body_of(RewardSpec))]) -> JsonAnswer:
        version = await rewards.add(spec)
        logger.info("the reward %s is at version %s", spec.name, version)
        return JsonAnswer({**spec.model_dump(), "version": version})

    @router.get("/{name}")
    async def show(name: str) -> JsonAnswer:
        return JsonAnswer(report_object(await rewards.report(name)))

    @router.delete("/{name}")
    async def remove(name: str) -> Response:
        await rewards.remove(name)
        logger.info("the reward %s was removed", name)
        return Response(status_code=204)

    @router.post("/{name}/score")
    async def score(name: str, body: Annotated[Score, Depends(body_of(Score))]) -> JsonAnswer:
        reward = await rewards.batched(name)
        inputs = [RewardInput(prompt=item.prompt, output=item.output) for item in body.inputs]
        scores: list[float] = []
        versions: set[str] = set()
        for begin in range(0, len(inputs), _CHUNK):  # in pieces, so that requests for this reward get between them
            scored = await reward.scored(inputs[begin : begin + _CHUNK])
            scores += scored.scores
            versions.add(scored.version)
            if len(versions) > 1:
                raise RewardChangedError(f"the reward {name!r} changed its version during this request; ask again")
        return JsonAnswer({"name": name, "version": versions.pop(), "rewards": scores})

    return router


def report_object(report: RewardReport) -> dict[str, Any]:
    """A reward as the admin API shows it."""
    return {
        "object": "reward",
        **report.spec.model_dump(),
        "version": report.version,
        "state": asdict(report.state) if report.state is not None else None,
        "error": report.error,
    }
