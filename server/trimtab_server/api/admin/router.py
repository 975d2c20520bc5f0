"""The admin API as one router, behind the admin key."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Depends

from trimtab_server.api.admin.adapters import AfterRetire, BaseVocabulary, ResidencyOf, build_adapters_router
from trimtab_server.api.admin.calibrators import Calibrators, build_calibrators_router
from trimtab_server.api.admin.canaries import OutcomesOf, build_canaries_router, no_outcomes
from trimtab_server.api.admin.engines import build_engines_router
from trimtab_server.api.admin.rewards import Rewards, build_rewards_router
from trimtab_server.api.admin.rollouts import Flush, build_rollouts_router
from trimtab_server.api.admin.routes import build_routes_router
from trimtab_server.api.admin.selection_caps import build_selection_caps_router
from trimtab_server.api.admin.switching import BeforeSwitch, RouteSwitcher
from trimtab_server.api.admin.training_jobs import build_training_jobs_router
from trimtab_server.api.admin.training_schedules import build_training_schedules_router
from trimtab_server.auth import require_admin
from trimtab_server.engine.base import Engine
from trimtab_server.overoptimization.cap_survey import CapSurvey
from trimtab_server.storage.catalog import SqlCatalog, Validate
from trimtab_server.storage.jobs import TrainingJobs
from trimtab_server.storage.rollouts import SqlRolloutReader
from trimtab_server.storage.training_schedules import TrainingSchedules


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminParts:
    """What the admin API works on.

    Attributes:
        catalog: Adapters and routes.
        reader: Reads the rollout log.
        flush: Brings acknowledged rollouts to the database.
        jobs: Training jobs.
        schedules: When training jobs are posted by themselves.
        rewards: The reward registry.
        cap_survey: Measures caps for best-of-N.
        engines: All engines.
        validate: Loads a version in the engine before it is registered.
        before_switch: Loads a version in the engine before a route points to it.
        after_retire: Frees a version in the engine.
        residency_of: Says whether a version is in the engine's memory.
        base_vocabulary: Fingerprint and number of tokens of the base model's tokenizer.
        adapter_roots: Directories that versions may be registered from; None means any.
        calibrators: Makes and keeps calibrators; None leaves `/admin/calibrators` out.
        canary_outcomes: Says what came of the requests of a canary.
    """

    catalog: SqlCatalog
    reader: SqlRolloutReader
    flush: Flush
    jobs: TrainingJobs
    schedules: TrainingSchedules
    rewards: Rewards
    cap_survey: CapSurvey
    engines: Sequence[Engine]
    validate: Validate
    before_switch: BeforeSwitch
    after_retire: AfterRetire
    residency_of: ResidencyOf
    base_vocabulary: BaseVocabulary
    adapter_roots: Sequence[Path] | None = None
    calibrators: Calibrators | None = None
    canary_outcomes: OutcomesOf = no_outcomes


def build_admin_router(parts: AdminParts) -> APIRouter:
    """All routes under `/admin`, behind `require_admin`."""
    switcher = RouteSwitcher(parts.catalog, parts.before_switch)
    router = APIRouter(dependencies=[Depends(require_admin)])
    router.include_router(
        build_adapters_router(
            parts.catalog,
            switcher,
            validate=parts.validate,
            before_pin=parts.before_switch,
            after_retire=parts.after_retire,
            residency_of=parts.residency_of,
            base_vocabulary=parts.base_vocabulary,
            adapter_roots=parts.adapter_roots,
        )
    )
    router.include_router(build_routes_router(parts.catalog, switcher, check_reward=parts.rewards.resolve))
    router.include_router(build_canaries_router(parts.catalog, switcher, parts.canary_outcomes))
    router.include_router(build_rollouts_router(parts.reader, parts.flush))
    router.include_router(build_training_jobs_router(parts.jobs))
    router.include_router(build_training_schedules_router(parts.schedules))
    router.include_router(build_rewards_router(parts.rewards))
    router.include_router(build_selection_caps_router(parts.cap_survey))
    router.include_router(build_engines_router(parts.engines))
    if parts.calibrators is not None:
        router.include_router(build_calibrators_router(parts.calibrators, parts.rewards, parts.catalog, parts.flush))
    return router
