"""`/admin/selection-caps`: measure how far best-of-N by one reward helps another."""

from typing import Annotated

from fastapi import APIRouter, Depends
from pydantic import Field

from trimtab_server.api.admin.json_io import Body, JsonAnswer, body_of, list_answer
from trimtab_server.overoptimization.cap_survey import DEFAULT_LIMIT, CapSurvey

RewardName = Annotated[str, Field(min_length=1, max_length=64)]


class Measure(Body):
    """Body of `POST /admin/selection-caps`."""

    proxy: RewardName
    """Name of the reward that chooses."""
    gold: RewardName
    """Name of the reward that is trusted more."""
    route: str | None = Field(default=None, max_length=256, pattern=r"^[^\x00]+$")
    """Rollouts of this route only."""
    since: float | None = None
    """Rollouts completed at or after this Unix time only."""
    limit: int = Field(default=DEFAULT_LIMIT, ge=1, le=1_000_000)
    """Most rollouts to read, oldest first."""


def build_selection_caps_router(survey: CapSurvey) -> APIRouter:
    """Routes for caps."""
    router = APIRouter(prefix="/admin/selection-caps")

    @router.get("")
    async def list_all() -> JsonAnswer:
        return list_answer(await survey.list())

    @router.post("")
    async def measure(body: Annotated[Measure, Depends(body_of(Measure))]) -> JsonAnswer:
        return JsonAnswer(
            await survey.measure(body.proxy, body.gold, route=body.route, since=body.since, limit=body.limit)
        )

    return router
