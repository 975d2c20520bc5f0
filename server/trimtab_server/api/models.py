"""`GET /v1/models` and `GET /v1/models/{id}`: the base model and the routes."""

from typing import Any

from fastapi import APIRouter, Depends, Request

from trimtab_adapters.contract.errors import NotFoundError
from trimtab_server.api.steering_report import steering_object
from trimtab_server.auth import require_api_key
from trimtab_server.gateway import GatewayParts
from trimtab_server.storage.base import RouteRevision

router = APIRouter(dependencies=[Depends(require_api_key)])


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """The base model first, then the routes."""
    return {"object": "list", "data": await _models(request)}


@router.get("/v1/models/{model_id:path}")
async def retrieve_model(request: Request, model_id: str) -> dict[str, Any]:
    """One model; its id may contain slashes."""
    for model in await _models(request):
        if model["id"] == model_id:
            return model
    raise NotFoundError(f"The model '{model_id}' does not exist", param="model", code="model_not_found")


async def _models(request: Request) -> list[dict[str, Any]]:
    parts: GatewayParts = request.app.state.parts
    status = parts.residency.last_status
    max_model_len = {"max_model_len": status.max_model_len} if status is not None else {}
    base = {
        "id": parts.settings.base_model,
        "object": "model",
        "created": int(request.app.state.started_at),
        "owned_by": "trimtab",
        "root": parts.settings.base_model,
        "parent": None,
        **max_model_len,
    }
    return [base, *(_route(route, parts.settings.base_model, max_model_len) for route in await parts.catalog.routes())]


def _route(route: RouteRevision, base_model: str, max_model_len: dict[str, int]) -> dict[str, Any]:
    return {
        "id": route.route,
        "object": "model",
        "created": int(route.created_at),
        "owned_by": "trimtab",
        "root": base_model,
        "parent": base_model,
        **max_model_len,
        "steering": steering_object(route.steering, route.options.operators, route.options.scale),
        "best_of": route.best_of,
        "reward": route.reward,
        "revision": route.revision,
    }
