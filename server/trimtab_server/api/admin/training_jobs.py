"""`/admin/training-jobs`: post jobs, and the calls by which workers take them."""

import json
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import Field, field_validator
from starlette.responses import Response

from trimtab_adapters.contract.params import VersionId
from trimtab_server.api.admin.json_io import Body, JsonAnswer, body_of, list_answer
from trimtab_server.storage.base import JobState
from trimtab_server.storage.jobs import TrainingJobs

MAX_CONFIG_BYTES = 1 << 20

WorkerName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:@/-]{0,127}$")]
JsonObject = dict[str, Any]


class SubmitJob(Body):
    """Body of `POST /admin/training-jobs`. The worker, not the gateway, knows what a configuration may say."""

    config: JsonObject = Field(min_length=1)
    name: str = Field(default="", max_length=200)
    """For people."""

    @field_validator("config")
    @classmethod
    def _is_small(cls, config: JsonObject) -> JsonObject:
        if len(json.dumps(config)) > MAX_CONFIG_BYTES:
            raise ValueError(f"a job's configuration may have at most {MAX_CONFIG_BYTES} bytes; name files by path")
        return config


class ClaimJob(Body):
    """Body of `POST /admin/training-jobs/claim`."""

    worker: WorkerName


class Heartbeat(Body):
    """Body of `POST /admin/training-jobs/{id}/heartbeat`."""

    worker: WorkerName
    progress: JsonObject = Field(default_factory=dict)


class FinishJob(Body):
    """Body of `POST /admin/training-jobs/{id}/finish`."""

    worker: WorkerName
    state: Literal["succeeded", "failed"]
    version: VersionId | None = None
    """The version that it published."""
    evaluation: JsonObject = Field(default_factory=dict)
    error: str | None = Field(default=None, max_length=20_000)


def build_training_jobs_router(jobs: TrainingJobs) -> APIRouter:
    """Routes for training jobs."""
    router = APIRouter(prefix="/admin/training-jobs")

    @router.post("")
    async def submit(body: Annotated[SubmitJob, Depends(body_of(SubmitJob))]) -> JsonAnswer:
        return JsonAnswer(await jobs.submit(body.config, name=body.name))

    @router.get("")
    async def list_all(state: Annotated[JobState | None, Query()] = None) -> JsonAnswer:
        return list_answer(await jobs.list(state))

    @router.post("/claim")
    async def claim(body: Annotated[ClaimJob, Depends(body_of(ClaimJob))]) -> Response:
        job = await jobs.claim(body.worker)
        return JsonAnswer(job) if job is not None else Response(status_code=204)

    @router.get("/{job_id}")
    async def show(job_id: str) -> JsonAnswer:
        return JsonAnswer(await jobs.get(job_id))

    @router.post("/{job_id}/heartbeat")
    async def heartbeat(job_id: str, body: Annotated[Heartbeat, Depends(body_of(Heartbeat))]) -> JsonAnswer:
        return JsonAnswer(await jobs.heartbeat(job_id, body.worker, body.progress))

    @router.post("/{job_id}/finish")
    async def finish(job_id: str, body: Annotated[FinishJob, Depends(body_of(FinishJob))]) -> JsonAnswer:
        return JsonAnswer(
            await jobs.finish(
                job_id,
                body.worker,
                body.state,
                version=body.version,
                evaluation=body.evaluation,
                error=body.error,
            )
        )

    @router.post("/{job_id}/cancel")
    async def cancel(job_id: str) -> JsonAnswer:
        return JsonAnswer(await jobs.cancel(job_id))

    return router
