"""`GET /admin/engines`: what each engine says of itself."""

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter

from trimtab_adapters.contract.errors import EngineError
from trimtab_server.api.admin.json_io import JsonAnswer, list_answer
from trimtab_server.engine.base import Engine


def build_engines_router(engines: Sequence[Engine]) -> APIRouter:
    """The route for engines. One that is away is listed with its error."""
    router = APIRouter(prefix="/admin/engines")

    @router.get("")
    async def list_all() -> JsonAnswer:
        return list_answer(await asyncio.gather(*(_describe(engine) for engine in engines)))

    return router


async def _describe(engine: Engine) -> dict[str, Any]:
    try:
        status = await engine.status()
    except EngineError as exc:
        return {"object": "engine", "name": engine.name, "is_available": False, "status": None, "error": exc.message}
    return {"object": "engine", "name": engine.name, "is_available": True, "status": status, "error": None}
