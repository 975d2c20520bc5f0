"""The application: routes, middleware and lifespan around the parts that are handed in."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware import Middleware

from trimtab_server.api import chat, completions, health, models, tokenize
from trimtab_server.auth import Auth
from trimtab_server.errors import install_error_handlers
from trimtab_server.gateway import GatewayParts
from trimtab_server.middleware import BodyLimit, ErrorBoundary, RequestId
from trimtab_server.residency_metrics import ResidencyCollector

__all__ = ["GatewayParts", "create_app"]

logger = logging.getLogger(__name__)


def create_app(parts: GatewayParts) -> FastAPI:
    """A gateway over these parts. Several may live in one process; nothing is shared between them."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(run()) for run in parts.background]
        for task in tasks:
            task.add_done_callback(_report)
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await parts.abandoned.aclose()
            for stop in parts.on_stop:
                await stop()
            await parts.residency.aclose()
            await parts.engine.aclose()

    app = FastAPI(
        title="Trimtab",
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # these pages load scripts from elsewhere; /openapi.json is there
        redoc_url=None,
        middleware=[
            Middleware(RequestId),
            Middleware(ErrorBoundary),
            Middleware(BodyLimit, max_bytes=parts.settings.max_body_bytes),
        ],
    )
    app.state.parts = parts
    parts.metrics.registry.register(ResidencyCollector(parts.residency))
    app.state.auth = Auth(parts.settings)
    app.state.started_at = time.time()
    install_error_handlers(app)
    for module in (health, completions, chat, models, tokenize):
        app.include_router(module.router)
    for router in parts.routers:
        app.include_router(router)
    return app


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.critical("a background task of the gateway died", exc_info=error)
