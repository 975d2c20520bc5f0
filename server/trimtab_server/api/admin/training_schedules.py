"""`/admin/training-schedules`: when training jobs are posted by themselves."""

import dataclasses
import logging
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import Field, model_validator
from starlette.responses import Response

from trimtab_adapters.contract.params import AdapterName
from trimtab_server.api.admin.json_io import Body, JsonAnswer, body_of, list_answer
from trimtab_server.api.admin.training_jobs import JobConfig
from trimtab_server.schedules.triggers import Drift, Every, Triggers
from trimtab_server.storage.training_schedules import TrainingSchedule, TrainingSchedules

logger = logging.getLogger(__name__)


class AddSchedule(Body):
    """Body of `POST /admin/training-schedules`; all but `name` and `config` says when, see `Triggers`."""

    name: AdapterName
    config: JobConfig
    route: str | None = Field(default=None)
    every: Every | None = None
    drift: Drift | None = None

    @model_validator(mode="after")
    def _can_act(self) -> "AddSchedule":
        self.triggers()
        return self

    def triggers(self) -> Triggers:
        """When the jobs are posted."""
        return Triggers(route=self.route, every=self.every, drift=self.drift)


def build_training_schedules_router(schedules: TrainingSchedules) -> APIRouter:
    """Routes for training schedules."""
    router = APIRouter(prefix="/admin/training-schedules")

    @router.post("")
    async def add(body: Annotated[AddSchedule, Depends(body_of(AddSchedule))]) -> JsonAnswer:
        schedule = await schedules.add(body.name, body.config, body.triggers().model_dump(mode="json"))
        logger.info("the training schedule %s was added", body.name)
        return JsonAnswer(answer(schedule))

    @router.get("")
    async def list_all() -> JsonAnswer:
        return list_answer(answer(schedule) for schedule in await schedules.list())

    @router.get("/{name}")
    async def show(name: str) -> JsonAnswer:
        return JsonAnswer(answer(await schedules.get(name)))

    @router.delete("/{name}")
    async def delete(name: str) -> Response:
        await schedules.delete(name)
        logger.info("the training schedule %s was deleted", name)
        return Response(status_code=204)

    @router.post("/{name}/pause")
    async def pause(name: str) -> JsonAnswer:
        return JsonAnswer(answer(await schedules.pause(name, True)))

    @router.post("/{name}/resume")
    async def resume(name: str) -> JsonAnswer:
        return JsonAnswer(answer(await schedules.pause(name, False)))

    return router


def answer(schedule: TrainingSchedule) -> dict[str, Any]:
    """A schedule as the API shows it: the triggers beside the rest, as they were posted."""
    fields = dataclasses.asdict(schedule)
    return {**fields.pop("triggers"), **fields, "is_running": schedule.is_running}
