"""`trimtab trainer`: claims training jobs from the gateway and runs them, one at a time."""

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trimtab_adapters.contract.errors import ConflictError, InvalidRequestError, NotFoundError, TrimtabError
from trimtab_training.config import TrainConfig, parse_config
from trimtab_training.gateway import GatewayClient, TrainingJob
from trimtab_training.interruption import Interruption, TrainingInterrupted
from trimtab_training.recipes.train import Report, TrainResult

logger = logging.getLogger(__name__)

Recipe = Callable[[TrainConfig, Interruption, Report], TrainResult]
"""Runs a configuration, from its newest checkpoint if there is one."""


class Worker:
    """Runs jobs until it is stopped.

    A job's files go to `output_dir/<job id>`: a job that was released, or whose worker died, is resumed from there by
    whoever claims it next and sees the same directory.

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
            job = self._gateway.claim_job(self._name)
            if job is not None:
                self.run_job(job)
            if once:
                return
            if job is None:
                self._stopping.wait(self._poll_s)

    def run_job(self, job: TrainingJob) -> None:
        """Run one claimed job to its end and report how it ended; a failing job does not stop the worker."""
        logger.info("job %s begins", job.id)
        interruption = Interruption()
        self._current = interruption
        if self._stopping.is_set():  # the signal came between the claim and this line
            interruption.request("released")
        heart = _Heart(self._gateway, job.id, self._name, interruption, self._heartbeat_s)
        try:
            with heart:
                result = self._recipe(self._config_of(job), interruption, heart.report)
        except TrainingInterrupted as exc:
            # A cancelled job has ended already; a released one is claimed again when its lease has run out.
            logger.info("job %s stopped: %s", job.id, exc.reason)
        except TrimtabError as exc:
            self._failed(job, exc.message)
        except Exception as exc:  # whatever a job does wrong must reach its owner and not end the worker
            logger.exception("job %s failed", job.id)
            self._failed(job, f"{type(exc).__name__}: {exc}")
        else:
            logger.info("job %s succeeded: version %s", job.id, result.version)
            self._finish(job, state="succeeded", version=result.version, evaluation=result.evaluation)
        finally:
            self._current = None

    def _config_of(self, job: TrainingJob) -> TrainConfig:
        gateway = job.config.get("gateway") or {}
        if not isinstance(gateway, Mapping):
            raise InvalidRequestError("the training configuration is not valid: gateway is not an object")
        output_dir = str(self._output_dir / job.id)
        return parse_config({**job.config, "gateway": {**gateway, "url": self._url}, "output_dir": output_dir})

    def _failed(self, job: TrainingJob, message: str) -> None:
        logger.error("job %s failed: %s", job.id, message)
        self._finish(job, state="failed", error=message)

    def _finish(self, job: TrainingJob, *, state: str, **outcome: Any) -> None:
        try:
            self._gateway.finish_job(job.id, self._name, state=state, **outcome)
        except TrimtabError as exc:  # the job's lease runs out, and it is claimed and resumed again
            logger.error("the end of job %s (%s) could not be reported: %s", job.id, state, exc.message)


class _Heart:
    """Heartbeats in a thread for as long as the context lasts; stops the job when the gateway says so."""

    def __init__(
        self, gateway: GatewayClient, job: str, worker: str, interruption: Interruption, interval_s: float
    ) -> None:
        self._gateway = gateway
        self._job = job
        self._worker = worker
        self._interruption = interruption
        self._interval_s = interval_s
        self._progress: Mapping[str, Any] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"heartbeat-{job}", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def report(self, progress: Mapping[str, Any]) -> None:
        """Keep what the next heartbeat tells."""
        self._progress = progress

    def _beat(self) -> None:
        while True:
            try:
                state = self._gateway.heartbeat(self._job, self._worker, self._progress).state
            except (NotFoundError, ConflictError) as exc:
                logger.warning("job %s is no longer ours: %s", self._job, exc.message)
                self._interruption.request("lost")
                return
            except TrimtabError as exc:  # the gateway is restarting; training goes on, and so do the heartbeats
                logger.warning("heartbeat of job %s: %s", self._job, exc.message)
            else:
                if state == "cancelled":
                    self._interruption.request("cancelled")
                    return
            if self._stopped.wait(self._interval_s):
                return
