"""`/admin/rollouts`: read and export the rollout log."""

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import Field
from starlette.responses import StreamingResponse

from trimtab_adapters.contract.rollout_filter import RolloutConditions, RolloutFilter
from trimtab_server.api.admin.json_io import JsonAnswer, list_answer
from trimtab_server.storage.export import MEDIA_TYPES, ExportFormat, export_chunks
from trimtab_server.storage.rollouts import SqlRolloutReader

Flush = Callable[[], Awaitable[None]]
"""Brings every acknowledged rollout to the database, for example `SpooledRolloutLog.flush`."""


class PageQuery(RolloutConditions):
    """Query of `GET /admin/rollouts`."""

    limit: int = Field(default=100, ge=1, le=1000)
    cursor: str | None = Field(default=None, max_length=2000)
    """`next_cursor` of the page before."""


class ExportQuery(RolloutConditions):
    """Query of `GET /admin/rollouts/export`."""

    format: ExportFormat = "jsonl"
    limit: int | None = Field(default=None, ge=1, lt=2**63)


def build_rollouts_router(reader: SqlRolloutReader, flush: Flush) -> APIRouter:
    """Routes for the rollout log.

    Args:
        reader: Reads it.
        flush: See `Flush`; called first, so that an answer holds all that was acknowledged before.
    """
    router = APIRouter(prefix="/admin/rollouts")

    @router.get("")
    async def page(query: Annotated[PageQuery, Query()]) -> JsonAnswer:
        await flush()
        found = await reader.page(_filter(query), size=query.limit, cursor=query.cursor)
        return list_answer(found.rollouts, has_more=found.cursor is not None, next_cursor=found.cursor)

    @router.get("/export")
    async def export(query: Annotated[ExportQuery, Query()]) -> StreamingResponse:
        await flush()
        return StreamingResponse(
            export_chunks(reader, _filter(query, query.limit), query.format),
            media_type=MEDIA_TYPES[query.format],
            headers={"Content-Disposition": f'attachment; filename="rollouts.{query.format}"'},
        )

    return router


def _filter(query: RolloutConditions, limit: int | None = None) -> RolloutFilter:
    given = query.model_dump(include=set(RolloutConditions.model_fields))
    return RolloutFilter(**given, limit=limit)
