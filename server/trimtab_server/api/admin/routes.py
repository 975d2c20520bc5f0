"""`/admin/routes`: public model names with their steering, history and rollback."""

import logging
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import BeforeValidator, Field
from starlette.responses import Response

from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_adapters.contract.params import AdapterName, Alpha, SteeringOptions, SteeringRequest, VersionId
from trimtab_server.api.admin.json_io import Body, JsonAnswer, body_of, list_answer
from trimtab_server.api.admin.switching import RouteSwitcher
from trimtab_server.api.steering_field import parse_steering
from trimtab_server.storage.base import Canary, RouteRevision
from trimtab_server.storage.catalog import SqlCatalog

logger = logging.getLogger(__name__)

MAX_BEST_OF = 128

CheckReward = Callable[[str], Awaitable[object]]
"""Raises `NotFoundError` or `RewardError` for a reward that cannot be used, for example `RewardRegistry.resolve`."""


class PutRoute(Body):
    """Body of `PUT /admin/routes/{name}`: the whole new state of the route."""

    steering: Annotated[SteeringRequest, BeforeValidator(parse_steering)] = SteeringRequest(adapters=[])
    """Adapters, operators and a negative prompt; with none of them the route is the base model under another name."""
    best_of: int | None = Field(default=None, ge=1, le=MAX_BEST_OF)
    reward: str | None = Field(default=None, max_length=64)
    comment: str = Field(default="", max_length=1000)


class Activate(Body):
    """Body of `POST /admin/routes/{name}/activate`."""

    adapter: AdapterName
    version: VersionId | None = None
    """None means the newest version that is not retired."""
    alpha: Alpha | None = None
    """None means the version's default."""
    comment: str = Field(default="", max_length=1000)


class Rollback(Body):
    """Body of `POST /admin/routes/{name}/rollback`."""

    revision: int | None = Field(default=None, ge=1, lt=2**31)
    """None means the one before the current."""


def build_routes_router(catalog: SqlCatalog, switcher: RouteSwitcher, *, check_reward: CheckReward) -> APIRouter:
    """Routes for routes.

    Args:
        catalog: Where they are kept.
        switcher: Changes them.
        check_reward: See `CheckReward`.
    """
    router = APIRouter(prefix="/admin/routes")

    def changed(revision: RouteRevision) -> JsonAnswer:
        logger.info("the route %s is at revision %d", revision.route, revision.revision)
        return JsonAnswer(route_object(revision))

    @router.get("")
    async def list_all() -> JsonAnswer:
        return list_answer(route_object(revision) for revision in await catalog.routes())

    @router.get("/{name}")
    async def show(name: str) -> JsonAnswer:
        return JsonAnswer(route_object(catalog.state.route(name)))

    @router.put("/{name}")
    async def put(name: str, body: Annotated[PutRoute, Depends(body_of(PutRoute))]) -> JsonAnswer:
        if body.reward is not None:
            await check_reward(body.reward)
        if body.steering.num_alternatives is not None:
            raise InvalidRequestError(
                "'steering.explain' belongs into a request; a route does not have it.", param="steering.explain"
            )
        return changed(
            await switcher.put(name, body.steering, best_of=body.best_of, reward=body.reward, comment=body.comment)
        )

    @router.delete("/{name}")
    async def delete(name: str) -> Response:
        await catalog.delete_route(name)
        logger.info("the route %s was deleted", name)
        return Response(status_code=204)

    @router.post("/{name}/activate")
    async def activate(name: str, body: Annotated[Activate, Depends(body_of(Activate))]) -> JsonAnswer:
        return changed(
            await switcher.activate(name, body.adapter, version=body.version, alpha=body.alpha, comment=body.comment)
        )

    @router.post("/{name}/rollback")
    async def rollback(
        name: str, body: Annotated[Rollback, Depends(body_of(Rollback, may_be_empty=True))]
    ) -> JsonAnswer:
        return changed(await switcher.rollback(name, revision=body.revision))

    @router.get("/{name}/history")
    async def history(name: str) -> JsonAnswer:
        return list_answer(route_object(revision) for revision in await catalog.history(name))

    return router


def route_object(revision: RouteRevision) -> dict[str, Any]:
    """A route's revision as the admin API shows it."""
    return {
        "object": "route",
        "route": revision.route,
        "revision": revision.revision,
        "steering": revision.steering,
        "operators": operators_object(revision.options),
        "best_of": revision.best_of,
        "reward": revision.reward,
        "created_at": revision.created_at,
        "comment": revision.comment,
        "canary": canary_object(revision.canary),
    }


def canary_object(canary: Canary | None) -> dict[str, Any] | None:
    """A canary as the admin API shows it; None where there is none."""
    if canary is None:
        return None
    return {
        "version": canary.version,
        "percent": canary.percent,
        "steering": canary.steering,
        "num_answers": canary.num_answers,
        "min_answers": canary.min_answers,
        "timeout_s": canary.timeout_s,
    }


def operators_object(options: SteeringOptions) -> dict[str, Any]:
    """What a route's steering has beside its adapters, as the body of `PUT` has it in `steering`; `{}` for nothing."""
    return options.model_dump(include=set(SteeringOptions.model_fields), exclude_none=True)
