"""Liveness, readiness, metrics and version. Open without a key, for probes and scrapers."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from trimtab_adapters.contract.errors import EngineError
from trimtab_server.errors import error_answer
from trimtab_server.gateway import GatewayParts

router = APIRouter()


@router.get("/health")
async def health() -> dict[str, str]:
    """200 while the process runs, whatever the engine does."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(request: Request) -> Response:
    """200 when the engine answers and holds all active versions; else 503 with `Retry-After`."""
    parts: GatewayParts = request.app.state.parts
    try:
        await parts.residency.check_ready()
    except EngineError as exc:
        answer = error_answer(exc)
        headers = {"Retry-After": "1", **answer.headers}
        return JSONResponse({"status": "not ready", **answer.body}, status_code=503, headers=headers)
    return JSONResponse({"status": "ready"})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    parts: GatewayParts = request.app.state.parts
    return Response(parts.metrics.render(), media_type=CONTENT_TYPE_LATEST)


@router.get("/version")
async def get_version(request: Request) -> dict[str, Any]:
    """Versions of Trimtab and, once known, of the engine's vLLM."""
    parts: GatewayParts = request.app.state.parts
    status = parts.residency.last_status
    try:
        own = version("trimtab")
    except PackageNotFoundError:  # run from a checkout that is not installed
        own = "unknown"
    return {"version": own, "vllm_version": (status.vllm_version or None) if status is not None else None}
