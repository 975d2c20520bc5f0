"""`trimtab serve`: the gateway with its storage and, unless engines run elsewhere, one supervised engine.

This is the composition root: the only place that names concrete parts. What is started here is stopped here.
"""

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn

from trimtab_adapters.contract.errors import EngineError, InvalidRequestError, TrimtabError, VocabularyError
from trimtab_adapters.contract.manifest import read_vocabulary, vocabulary_fingerprint
from trimtab_adapters.store import VersionStore
from trimtab_server.api.admin.calibrators import Calibrators
from trimtab_server.api.admin.router import AdminParts, build_admin_router
from trimtab_server.api.feedback import build_feedback_router
from trimtab_server.app import create_app
from trimtab_server.calibration.fitting import CalibratorFitting
from trimtab_server.canary.watcher import CanaryWatcher
from trimtab_server.decoding.pooled import PooledCalibrators
from trimtab_server.decoding.reference import ReferenceCalibrators
from trimtab_server.decoding.scoring import CalibratedScoring
from trimtab_server.engine.base import Engine
from trimtab_server.engine.black_box import BlackBoxEngine, BlackBoxOptions
from trimtab_server.engine.black_box_provider import Provider, ProviderLimits, build_provider_client
from trimtab_server.engine.residency import Residency
from trimtab_server.engine.transformers_engine import TransformersEngine
from trimtab_server.engine.vllm_http import VllmEngine, build_engine_client
from trimtab_server.gateway import GatewayParts
from trimtab_server.metrics import Metrics
from trimtab_server.overoptimization.cap_survey import CapSurvey
from trimtab_server.overoptimization.selection_caps import SelectionCaps
from trimtab_server.rewards.registry import RewardRegistry
from trimtab_server.schedules.scheduler import Scheduler
from trimtab_server.settings import Settings
from trimtab_server.storage.calibrators import SqlCalibratorStore, SqlPooledCalibratorStore
from trimtab_server.storage.canaries import SqlCanaries
from trimtab_server.storage.catalog import SqlCatalog
from trimtab_server.storage.database import Database
from trimtab_server.storage.feedback import SqlFeedback
from trimtab_server.storage.identified_log import IdentifiedRolloutLog
from trimtab_server.storage.jobs import TrainingJobs
from trimtab_server.storage.reference_samples import SqlSampleLog
from trimtab_server.storage.reward_specs import SqlRewardSpecs
from trimtab_server.storage.rollout_log import SpooledRolloutLog
from trimtab_server.storage.rollouts import SqlRolloutReader
from trimtab_server.storage.selection_caps import SqlSelectionCaps
from trimtab_server.storage.traffic import SqlTraffic
from trimtab_server.storage.training_schedules import TrainingSchedules
from trimtab_server.supervisor import EngineSupervisor

logger = logging.getLogger(__name__)

Run = Callable[[], Coroutine[Any, Any, None]]
_SHUTDOWN_GRACE_S = 10


def run(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit status: 1, with the reason on standard error, when it cannot."""
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)  # one line per engine call
    try:
        return asyncio.run(_serve(settings))
    except (TrimtabError, OSError) as exc:
        print(f"trimtab serve: {exc}", file=sys.stderr)
        return 1


async def _serve(settings: Settings) -> int:
    if settings.model is None and not settings.engine_urls and settings.black_box_url is None:
        raise InvalidRequestError(
            "there is nothing to serve: name a base model (--model), an engine (--engine-url) or the API of a base "
            "(--black-box-url)"
        )
    if len(settings.engine_urls) > 1:
        raise InvalidRequestError("one gateway serves one engine; start a gateway for each engine")
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    # Taken before anything is started, so that a port in use is an error at once.
    listener = _listen(settings.host, settings.port)
    try:
        parts = await build_parts(settings)
        config = uvicorn.Config(
            create_app(parts),
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=_SHUTDOWN_GRACE_S,
            timeout_keep_alive=60,
        )
        host, port = listener.getsockname()[:2]
        logger.info("listening on http://%s:%d", host, port)
        await uvicorn.Server(config).serve(sockets=[listener])
    finally:
        listener.close()
    return 0


async def build_parts(settings: Settings) -> GatewayParts:
    """All parts of a gateway, with the database migrated and the adapters of the command line registered.

    Raises:
        TrimtabError: An adapter of the command line is refused, or the storage cannot be used.
    """
    database = Database(settings.database)
    database.migrate()
    store = VersionStore(settings.data_dir / "adapters")
    catalog = SqlCatalog(database, store, settings.base_model)
    await catalog.load()
    await _register_given(settings, catalog)
    rollout_log = SpooledRolloutLog(database, settings.data_dir / "spool", settings.rollouts)
    await rollout_log.start()
    background: list[Run] = []
    engine = _build_engine(settings, background)
    residency = Residency(engine, catalog, wait_s=settings.adapter_wait_s)
    metrics = Metrics()
    rewards = RewardRegistry(SqlRewardSpecs(database), environment=os.environ, observer=metrics.rewards)
    stored_scores, samples = SqlCalibratorStore(database), SqlSampleLog(database)
    pooled = SqlPooledCalibratorStore(database)
    calibrators = ReferenceCalibrators(stored_scores, samples, default_size=settings.calibration_size)

    def base_identity() -> str | None:
        return residency.last_status.base_identity if residency.last_status is not None else None

    identified_log = IdentifiedRolloutLog(rollout_log, base_identity)

    reader = SqlRolloutReader(database)
    selection_caps = SelectionCaps(SqlSelectionCaps(database))
    canaries = CanaryWatcher(SqlCanaries(catalog))
    schedules = TrainingSchedules(database)
    background += [residency.keep_converged, canaries.run, Scheduler(schedules, SqlTraffic(database)).run]

    async def close_database() -> None:
        database.close()

    admin = AdminParts(
        catalog=catalog,
        reader=reader,
        flush=rollout_log.flush,
        jobs=TrainingJobs(database),
        schedules=schedules,
        rewards=rewards,
        cap_survey=CapSurvey(reader, rollout_log.flush, rewards, selection_caps, settings.base_model),
        engines=[engine],
        validate=residency.try_out,
        before_switch=residency.ensure,
        after_retire=residency.retire,
        residency_of=residency.describe,
        base_vocabulary=partial(_base_vocabulary, settings, engine),
        adapter_roots=settings.adapter_roots or None,
        canary_outcomes=canaries.outcomes,
        calibrators=Calibrators(
            fitting=CalibratorFitting(engine, rewards, calibrators, samples, pooled, identified_log),
            scores=stored_scores,
            pooled=pooled,
            base_identity=base_identity,
        ),
    )
    return GatewayParts(
        settings=settings,
        engine=engine,
        residency=residency,
        catalog=catalog,
        rollout_log=identified_log,
        caps=selection_caps,
        canaries=canaries,
        scoring=CalibratedScoring(rewards, calibrators, PooledCalibrators(pooled), base_identity=base_identity),
        routers=[build_admin_router(admin), build_feedback_router(SqlFeedback(database, rollout_log.flush))],
        background=background,
        metrics=metrics,
        on_stop=[rewards.aclose, rollout_log.aclose, close_database],
    )


def _build_engine(settings: Settings, background: list[Run]) -> Engine:
    """A base in this process or behind an API, the engine at the given address, or a supervised child on loopback."""
    if settings.black_box_url is not None:
        return _build_black_box(settings, settings.black_box_url)
    if settings.engine_kind == "transformers" and settings.model is not None:
        return _build_transformers(settings, settings.model)
    if settings.engine_urls:
        (url,) = settings.engine_urls
        key = settings.engine_api_key.get_secret_value() if settings.engine_api_key else None
        return VllmEngine(url, "engine", build_engine_client(key), max_concurrent=settings.max_concurrent_candidates)
    with _listen("127.0.0.1", 0) as probe:
        port = probe.getsockname()[1]

    async def is_ready() -> bool:
        try:
            await engine.status()
        except EngineError:
            return False
        return True

    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRIMTAB_")}
    environment.pop("VLLM_API_KEY", None)  # it listens on loopback, for this gateway alone
    supervisor = EngineSupervisor(engine_command(settings, port), is_ready, environment=environment)
    engine = VllmEngine(
        f"http://127.0.0.1:{port}",
        "engine",
        build_engine_client(),
        max_concurrent=settings.max_concurrent_candidates,
        retry_after_s=lambda: supervisor.retry_after_s,
    )
    background.append(supervisor.run)
    return engine


def _build_black_box(settings: Settings, url: str) -> Engine:
    """Adapter LMs in this process beside a base behind an API. Raises `TrimtabError`: there is no such tokenizer."""
    with _needs_torch("a black-box base"):
        from trimtab_adapters.in_process.stepper import BaseModel, Stepper  # noqa: PLC0415 - loads torch
        from trimtab_adapters.in_process.tokenizer import load_base_tokenizer  # noqa: PLC0415
    tokenizer = load_base_tokenizer(settings.black_box_tokenizer or "")
    fingerprint = vocabulary_fingerprint(tokenizer.vocabulary)
    base = BaseModel(
        vocab_size=tokenizer.num_tokens,
        num_tokens=tokenizer.num_tokens,
        vocabulary_sha256=fingerprint,
        max_model_len=settings.black_box_context,
    )
    limits = ProviderLimits(
        timeout_s=settings.black_box_timeout_s,
        deadline_s=settings.black_box_deadline_s,
        max_retries=settings.black_box_max_retries,
        max_calls=settings.black_box_max_calls,
    )
    key = settings.black_box_api_key.get_secret_value() if settings.black_box_api_key else None
    options = BlackBoxOptions(
        api=settings.black_box_api,
        prompt=settings.black_box_prompt,
        num_top=settings.black_box_logprobs,
        lookahead=settings.black_box_lookahead,
        max_model_len=settings.black_box_context,
        unseen=settings.black_box_unseen,
    )
    return BlackBoxEngine(
        Provider(url, settings.black_box_model or "", build_provider_client(key), limits),
        Stepper(base, unseen=options.unseen, kv_bytes=settings.adapter_kv_bytes),
        tokenizer,
        options,
        vocabulary_sha256=fingerprint,
        max_concurrent=settings.max_concurrent_candidates,
    )


def _build_transformers(settings: Settings, model: str) -> Engine:
    """Base and adapter LMs in this process. Raises `TrimtabError`: there is no such model or tokenizer."""
    with _needs_torch("a base that runs in transformers"):
        from trimtab_adapters.in_process.stepper import BaseModel, Stepper  # noqa: PLC0415 - loads torch
        from trimtab_adapters.in_process.tokenizer import load_base_tokenizer  # noqa: PLC0415
        from trimtab_adapters.in_process.transformers_base import load_transformers_base  # noqa: PLC0415
    tokenizer = load_base_tokenizer(model)
    fingerprint = vocabulary_fingerprint(tokenizer.vocabulary)
    lm = load_transformers_base(
        model,
        tokenizer.num_tokens,
        dtype=settings.transformers_dtype,
        device=settings.transformers_device,
        context=settings.transformers_context,
    )
    base = BaseModel(
        vocab_size=tokenizer.num_tokens,
        num_tokens=tokenizer.num_tokens,
        vocabulary_sha256=fingerprint,
        max_model_len=lm.limits.total,
    )
    return TransformersEngine(
        Stepper(base, lm=lm, kv_bytes=settings.adapter_kv_bytes),
        tokenizer,
        model=model,
        limits=lm.limits,
        has_encoder=lm.has_encoder,
        vocabulary_sha256=fingerprint,
        max_concurrent=settings.max_concurrent_candidates,
    )


@contextmanager
def _needs_torch(what: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as exc:
        raise InvalidRequestError(
            f"{what} needs packages that are not installed here ({exc}): adapter LMs run in the gateway's process, "
            "with torch and transformers"
        ) from exc


def engine_command(settings: Settings, port: int) -> list[str]:
    """The command line of the supervised engine."""
    if settings.model is None:
        raise ValueError("a supervised engine needs settings.model")
    return [
        *(sys.executable, "-m", "trimtab_adapters.vllm.launch"),
        *("--model", settings.model, "--served-model-name", settings.base_model),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--die-with-parent", "--nice", str(settings.engine_nice)),
        *settings.engine_args,
    ]


async def _register_given(settings: Settings, catalog: SqlCatalog) -> None:
    """Register the adapters of the command line; each new one gets a route of its name.

    A version that is known already changes no route, so that a restart with the same command line keeps later swaps.
    """
    for name, directory in settings.adapters.items():
        before = set(catalog.state.versions)
        version = await catalog.register(
            directory.expanduser().absolute(), name=name, expected_vocabulary=_local_vocabulary(settings)
        )
        if version.version not in before or name not in catalog.state.routes:
            await catalog.activate(name, name, version.version, comment="given on the command line")


async def _base_vocabulary(settings: Settings, engine: Engine) -> tuple[str, int] | None:
    """As the engine tells it; where it does not answer, of a base that is a directory here."""
    try:
        status = await engine.status()
    except EngineError:
        return _local_vocabulary(settings)
    return status.vocabulary_sha256, status.num_tokens


def _local_vocabulary(settings: Settings) -> tuple[str, int] | None:
    """Fingerprint and size of the base's tokenizer when the base is a directory here; else the engine checks it."""
    source = settings.model or settings.black_box_tokenizer
    directory = Path(source).expanduser() if source else None
    if directory is None or not (directory / "tokenizer.json").is_file():
        return None
    try:
        vocabulary = read_vocabulary(directory)
    except VocabularyError:
        return None
    return vocabulary_fingerprint(vocabulary), max(vocabulary.values()) + 1


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `OSError`, for example when the port is in use."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except OSError:
        listener.close()
        raise
    return listener
