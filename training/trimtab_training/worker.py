"""`trimtab trainer`: claims training jobs from the gateway and runs them, one at a time."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from trimtab_adapters.contract.errors import (
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    StorageError,
    TrimtabError,
)
from trimtab_training.config import TrainConfig, parse_config
from trimtab_training.gateway import GatewayClient, TrainingJob
from trimtab_training.interruption import Interruption, TrainingInterrupted
from trimtab_training.job_feed import JobFeed, job_log
from trimtab_training.recipes.train import TrainResult

logger = logging.getLogger(__name__)

LOG_FILE = "job.log"
_LEASE_MARGIN = 0.1
"""Share of the lease that is kept for ending the step at hand."""
_LONGEST_ERROR = 20_000

Recipe = Callable[[TrainConfig, Interruption, JobFeed], TrainResult]
"""Runs a configuration, from its newest checkpoint if there is one."""


class Worker:
    """Runs jobs until it is stopped.

    A job's files go to `output_dir/<job id>`: a job that was released, or whose worker died, is resumed from there by
    whoever claims it next and sees the same directory. A worker that could not say for the time of a lease that it is
    alive stops by itself, since another may have its job by then.

    Args:
        gateway: Used for claims, heartbeats and reports; must not stop waiting when a job does.
        name: Name of this worker, unique among the gateway's workers.
        url: The gateway's address, for the job's own connection.
        output_dir: Where jobs keep their files.
        recipe: What a job runs.
        heartbeat_s: Seconds between two signs of life; the gateway's lease must be longer.
        poll_s: Seconds between two questions for work.
    """

    def __init__(
        self,
        gateway: GatewayClient,
        *,
        name: str,
        url: str,
        output_dir: Path,
        recipe: Recipe,
        heartbeat_s: float = 5.0,
        poll_s: float = 2.0,
    ) -> None:
        self._gateway = gateway
        self._name = name
        self._url = url
        self._output_dir = output_dir
        self._recipe = recipe
        self._heartbeat_s = heartbeat_s
        self._poll_s = poll_s
        self._stopping = threading.Event()
        self._current: Interruption | None = None

    def stop(self) -> None:
        """Let the job write a checkpoint and return from `run`. May be called from a signal handler."""
        self._stopping.set()
        if (current := self._current) is not None:
            current.request("released")

    def run(self, *, once: bool = False) -> None:
        """Claim and run jobs until `stop`; with `once`, one job, or none when none is waiting.

        Raises:
            TrimtabError: The gateway refused a claim or could not be reached for long.
        """
        while not self._stopping.is_set():
            asked_at = time.monotonic()
            job = self._gateway.claim_job(self._name)
            if job is not None:
                self.run_job(job, asked_at)
            if once:
                return
            if job is None:
                self._stopping.wait(self._poll_s)

    def run_job(self, job: TrainingJob, asked_at: float) -> None:
        """Run one claimed job to its end and report how it ended; a failing job does not stop the worker.

        Args:
            job: As it was claimed.
            asked_at: When it was asked for, of `time.monotonic`: its lease began no earlier.
        """
        interruption = Interruption()
        self._current = interruption
        if self._stopping.is_set():  # the signal came between the claim and this line
            interruption.request("released")
        feed = JobFeed()
        heart = _Heart(self._gateway, job, self._name, interruption, feed, self._heartbeat_s)
        heart.extend_lease(asked_at)
        try:
            with job_log(self._output_dir / job.id / LOG_FILE, feed), heart:
                report = self._run(job, interruption, feed)
        except StorageError as exc:  # there is no place for its files
            report = self._failed(job, exc.message)
        finally:
            self._current = None
        if report is None:
            return
        try:
            report()
        except TrimtabError as exc:  # the job's lease runs out, and it is claimed and resumed again
            logger.error("the end of job %s could not be reported: %s", job.id, exc.message)

    def _run(self, job: TrainingJob, interruption: Interruption, feed: JobFeed) -> Callable[[], None] | None:
        """Run the recipe; returns what reports its end to the gateway, None where it knows."""
        logger.info("attempt %s of job %s begins", job.attempt or 1, job.id)
        try:
            result = self._recipe(self._config_of(job), interruption, feed)
        except TrainingInterrupted as exc:
            logger.info("job %s stopped: %s", job.id, exc.reason)
            # A cancelled job has ended already, and a lost one may be another worker's.
            return partial(self._gateway.release_job, job, self._name) if exc.reason == "released" else None
        except TrimtabError as exc:
            logger.error("job %s failed: %s", job.id, exc.message)
            return self._failed(job, exc.message)
        except Exception as exc:  # whatever a job does wrong must reach its owner and not end the worker
            logger.exception("job %s failed", job.id)
            return self._failed(job, f"{type(exc).__name__}: {exc}")
        logger.info("job %s succeeded: version %s", job.id, result.version)
        end = partial(self._gateway.finish_job, job, self._name, state="succeeded")
        return partial(end, version=result.version, evaluation=result.evaluation)

    def _failed(self, job: TrainingJob, message: str) -> Callable[[], None]:
        return partial(self._gateway.finish_job, job, self._name, state="failed", error=message[:_LONGEST_ERROR])

    def _config_of(self, job: TrainingJob) -> TrainConfig:
        gateway = job.config.get("gateway") or {}
        if not isinstance(gateway, Mapping):
            raise InvalidRequestError("the training configuration is not valid: gateway is not an object")
        output_dir = str(self._output_dir / job.id)
        return parse_config({**job.config, "gateway": {**gateway, "url": self._url}, "output_dir": output_dir})


class _Heart:
    """Heartbeats in a thread for as long as the context lasts, with the job's news; stops the job when it must end."""

    def __init__(
        self,
        gateway: GatewayClient,
        job: TrainingJob,
        worker: str,
        interruption: Interruption,
        feed: JobFeed,
        interval_s: float,
    ) -> None:
        self._gateway = gateway
        self._job = job
        self._worker = worker
        self._interruption = interruption
        self._feed = feed
        self._interval_s = interval_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"heartbeat-{job.id}", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def extend_lease(self, asked_at: float) -> None:
        """The gateway took a claim or a heartbeat that was sent at `asked_at`."""
        self._interruption.expire_at(asked_at + (1.0 - _LEASE_MARGIN) * self._job.lease_s)

    def _beat(self) -> None:
        is_last = False
        while True:
            asked_at, news = time.monotonic(), self._feed.body()
            try:
                state = self._gateway.heartbeat(self._job, self._worker, news).state
            except (NotFoundError, ConflictError) as exc:
                logger.warning("job %s is no longer ours: %s", self._job.id, exc.message)
                self._interruption.request("lost")
                return
            except InvalidRequestError as exc:  # the job's own file has these lines
                self._feed.sent(news)
                logger.warning("the gateway refused the news of job %s: %s", self._job.id, exc.message)
            except TrimtabError as exc:  # the gateway is restarting; training goes on, and so do the heartbeats
                logger.warning("heartbeat of job %s: %s", self._job.id, exc.message)
            else:
                self._feed.sent(news)
                self.extend_lease(asked_at)
                if state == "cancelled":
                    self._interruption.request("cancelled")
            if is_last:
                return
            is_last = self._stopped.wait(self._interval_s)
