"""`/admin/training-jobs`: post jobs, and the calls by which workers take them."""

import dataclasses
import json
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Depends, Query
from pydantic import AfterValidator, Field, model_validator
from starlette.responses import Response

from trimtab_adapters.contract.params import VersionId
from trimtab_server.api.admin.json_io import Body, JsonAnswer, body_of, list_answer
from trimtab_server.storage.base import JobLine, JobState
from trimtab_server.storage.job_lines import MAX_LINES
from trimtab_server.storage.jobs import TrainingJobs

MAX_CONFIG_BYTES = 1 << 20
MAX_LINES_SENT = 1000
"""Most lines of each kind in a heartbeat."""
MAX_LINE_CHARS = 4000
"""Longest line of a log; the worker cuts longer ones."""
MAX_FIGURES = 200
"""Most figures in a line of metrics."""

WorkerName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:@/-]{0,127}$")]
JsonObject = dict[str, Any]
Attempt = Annotated[int | None, Field(ge=1)]
"""Which claim of the job the worker acts on; left out means its latest."""
Tail = Annotated[int, Query(ge=1, le=MAX_LINES)]


def _is_small(config: JsonObject) -> JsonObject:
    if len(json.dumps(config)) > MAX_CONFIG_BYTES:
        raise ValueError(f"a job's configuration may have at most {MAX_CONFIG_BYTES} bytes; name files by path")
    return config


JobConfig = Annotated[JsonObject, Field(min_length=1), AfterValidator(_is_small)]
"""The worker, not the gateway, knows what it may say."""


class SubmitJob(Body):
    """Body of `POST /admin/training-jobs`."""

    config: JobConfig
    name: str = Field(default="", max_length=200)
    """For people."""


class ClaimJob(Body):
    """Body of `POST /admin/training-jobs/claim`."""

    worker: WorkerName


class LogLine(Body):
    """A line of a job's log; `number` counts from 1 in each attempt."""

    number: int = Field(ge=1, lt=1 << 31)
    text: str = Field(max_length=MAX_LINE_CHARS)


class MetricsLine(Body):
    """A line of a job's metrics; null is a figure that is no finite number."""

    number: int = Field(ge=1, lt=1 << 31)
    step: int = Field(ge=0)
    time: float
    figures: dict[Annotated[str, Field(max_length=128)], float | None] = Field(max_length=MAX_FIGURES)


class Heartbeat(Body):
    """Body of `POST /admin/training-jobs/{id}/heartbeat`."""

    worker: WorkerName
    attempt: Attempt = None
    progress: JsonObject = Field(default_factory=dict)
    log: list[LogLine] = Field(default_factory=list, max_length=MAX_LINES_SENT)
    """New lines; needs `attempt`."""
    metrics: list[MetricsLine] = Field(default_factory=list, max_length=MAX_LINES_SENT)
    """New lines; needs `attempt`."""

    @model_validator(mode="after")
    def _lines_have_an_attempt(self) -> Self:
        if (self.log or self.metrics) and self.attempt is None:
            raise ValueError("lines of a log or metrics need the attempt that they belong to")
        return self

    def lines_of_log(self) -> list[JobLine]:
        """As they are stored."""
        return [JobLine(self.attempt or 0, line.number, line.text) for line in self.log]

    def lines_of_metrics(self) -> list[JobLine]:
        """As they are stored."""
        return [
            JobLine(self.attempt or 0, line.number, {"time": line.time, "figures": line.figures}, line.step)
            for line in self.metrics
        ]


class ReleaseJob(Body):
    """Body of `POST /admin/training-jobs/{id}/release`."""

    worker: WorkerName
    attempt: Attempt = None


class FinishJob(Body):
    """Body of `POST /admin/training-jobs/{id}/finish`."""

    worker: WorkerName
    attempt: Attempt = None
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
        if job is None:
            return Response(status_code=204)
        return JsonAnswer({**dataclasses.asdict(job), "lease_s": jobs.lease_s})

    @router.get("/{job_id}")
    async def show(job_id: str) -> JsonAnswer:
        return JsonAnswer(await jobs.get(job_id))

    @router.post("/{job_id}/heartbeat")
    async def heartbeat(job_id: str, body: Annotated[Heartbeat, Depends(body_of(Heartbeat))]) -> JsonAnswer:
        return JsonAnswer(
            await jobs.heartbeat(
                job_id,
                body.worker,
                body.progress,
                attempt=body.attempt,
                log=body.lines_of_log(),
                metrics=body.lines_of_metrics(),
            )
        )

    @router.get("/{job_id}/log")
    async def log(job_id: str, tail: Tail = 100) -> JsonAnswer:
        lines = await jobs.lines(job_id, "log", tail=tail)
        return list_answer({"attempt": i.attempt, "number": i.number, "text": i.content} for i in lines)

    @router.get("/{job_id}/metrics")
    async def metrics(job_id: str, tail: Tail = 100) -> JsonAnswer:
        lines = await jobs.lines(job_id, "metrics", tail=tail)
        return list_answer(
            {"attempt": i.attempt, "number": i.number, "step": int(i.step or 0), **i.content} for i in lines
        )

    @router.post("/{job_id}/release")
    async def release(job_id: str, body: Annotated[ReleaseJob, Depends(body_of(ReleaseJob))]) -> JsonAnswer:
        return JsonAnswer(await jobs.release(job_id, body.worker, attempt=body.attempt))

    @router.post("/{job_id}/finish")
    async def finish(job_id: str, body: Annotated[FinishJob, Depends(body_of(FinishJob))]) -> JsonAnswer:
        return JsonAnswer(
            await jobs.finish(
                job_id,
                body.worker,
                body.state,
                attempt=body.attempt,
                version=body.version,
                evaluation=body.evaluation,
                error=body.error,
            )
        )

    @router.post("/{job_id}/cancel")
    async def cancel(job_id: str) -> JsonAnswer:
        return JsonAnswer(await jobs.cancel(job_id))

    return router
