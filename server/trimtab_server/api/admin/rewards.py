"""`/admin/rewards`: register rewards and score texts with them."""

from collections.abc import Sequence
from typing import Annotated, Protocol

from fastapi import APIRouter, Depends
from pydantic import Field

from trimtab_adapters.contract.rewards import RewardInput, RewardModel, RewardSpec
from trimtab_server.api.admin.json_io import Body, JsonAnswer, body_of, list_answer

MAX_INPUTS = 4096
_CHUNK = 64


class RewardScorer(Protocol):
    """A reward behind its queue."""

    @property
    def version(self) -> str:
        """Changes whenever scores could change."""
        ...

    async def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        """One finite number per input. Raises `RewardError`."""
        ...


class Rewards(Protocol):
    """What these routes need of the reward registry."""

    async def batched(self, name: str) -> RewardScorer:
        """Raises `NotFoundError` or `RewardError`."""
        ...

    async def list(self) -> Sequence[RewardSpec]:
        """All rewards that can be named."""
        ...

    async def add(self, spec: RewardSpec) -> RewardModel:
        """Build and register a reward. Raises `InvalidRequestError`."""
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
        model = await rewards.add(spec)
        return JsonAnswer({**spec.model_dump(), "version": model.version})

    @router.post("/{name}/score")
    async def score(name: str, body: Annotated[Score, Depends(body_of(Score))]) -> JsonAnswer:
        reward = await rewards.batched(name)
        inputs = [RewardInput(prompt=item.prompt, output=item.output) for item in body.inputs]
        scores: list[float] = []
        for begin in range(0, len(inputs), _CHUNK):  # in pieces, so that requests for this reward get between them
            scores += await reward.score(inputs[begin : begin + _CHUNK])
        return JsonAnswer({"name": name, "version": reward.version, "rewards": scores})

    return router
