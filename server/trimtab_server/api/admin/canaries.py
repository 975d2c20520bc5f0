"""`/admin/routes/{name}/promote` and `/canary`: a new version on a share of a route's requests."""

import logging
from collections.abc import Callable
from typing import Annotated, Any, Self

from fastapi import APIRouter, Depends
from pydantic import Field, model_validator

from trimtab_adapters.contract.errors import NotFoundError
from trimtab_adapters.contract.params import AdapterName, Alpha, VersionId
from trimtab_server.api.admin.json_io import Body, JsonAnswer, body_of
from trimtab_server.api.admin.routes import canary_object, route_object
from trimtab_server.api.admin.switching import RouteSwitcher
from trimtab_server.canary.decision import LOOKS, CanaryRule
from trimtab_server.canary.outcomes import CanaryOutcomes
from trimtab_server.storage.base import RouteRevision
from trimtab_server.storage.catalog import SqlCatalog

logger = logging.getLogger(__name__)

OutcomesOf = Callable[[RouteRevision], CanaryOutcomes]
"""What came of the requests of a revision that has a canary, for example `CanaryWatcher.outcomes`."""


def no_outcomes(revision: RouteRevision) -> CanaryOutcomes:
    """Of a gateway that watches no canaries."""
    return CanaryOutcomes()


class Promote(Body):
    """Body of `POST /admin/routes/{name}/promote`."""

    adapter: AdapterName
    version: VersionId | None = None
    """None means the newest version that is not retired."""
    alpha: Alpha | None = None
    """None means the version's default."""
    percent: float = Field(default=10.0, gt=0, lt=100)
    """Share of the route's requests that try it."""
    num_answers: int = Field(default=400, ge=LOOKS, le=10_000_000)
    """Requests of that share after which it takes the whole route, unless its answers are worse."""
    min_answers: int = Field(default=20, ge=1)
    """With fewer when the time is up it is rolled back, since nothing is known of it."""
    timeout_s: float = Field(default=3600.0, gt=0, le=31 * 86400)
    force: bool = False
    """Whether it may be tried although it has not passed the gate of its training."""
    comment: str = Field(default="", max_length=1000)

    @model_validator(mode="after")
    def _has_enough(self) -> Self:
        if self.min_answers > self.num_answers:
            raise ValueError("min_answers may not be more than num_answers")
        return self


def build_canaries_router(
    catalog: SqlCatalog, switcher: RouteSwitcher, outcomes_of: OutcomesOf = no_outcomes
) -> APIRouter:
    """Routes for canaries.

    Args:
        catalog: Where routes are kept.
        switcher: Begins a canary.
        outcomes_of: See `OutcomesOf`.
    """
    router = APIRouter(prefix="/admin/routes")

    @router.post("/{name}/promote")
    async def promote(name: str, body: Annotated[Promote, Depends(body_of(Promote))]) -> JsonAnswer:
        revision = await switcher.promote(
            name,
            body.adapter,
            version=body.version,
            alpha=body.alpha,
            percent=body.percent,
            rule=CanaryRule(body.num_answers, body.min_answers, body.timeout_s),
            is_forced=body.force,
            comment=body.comment,
        )
        logger.info("the route %s tries a version on %g %% of its requests", name, body.percent)
        return JsonAnswer(route_object(revision))

    @router.get("/{name}/canary")
    async def show(name: str) -> JsonAnswer:
        revision = catalog.state.route(name)
        if revision.canary is None:
            raise NotFoundError(f"The route `{name}` has no canary", param="route", code="no_canary")
        return JsonAnswer(_object(revision, outcomes_of(revision)))

    return router


def _object(revision: RouteRevision, outcomes: CanaryOutcomes) -> dict[str, Any]:
    return {
        "object": "canary",
        "route": revision.route,
        "revision": revision.revision,
        **(canary_object(revision.canary) or {}),
        "started_at": revision.created_at,
        "outcomes": {"canary": outcomes.canary.to_json(), "stable": outcomes.stable.to_json()},
    }
