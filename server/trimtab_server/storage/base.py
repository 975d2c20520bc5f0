"""What the rest of the gateway needs from storage, as Protocols, and the plain values that pass through them."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from trimtab_adapters.contract.calibration import ReferenceScores
from trimtab_adapters.contract.manifest import Manifest
from trimtab_adapters.contract.params import AdapterWeight, SteeringOptions, SteeringRequest, VersionId
from trimtab_adapters.contract.pooled_calibration import PooledCalibrator
from trimtab_adapters.contract.records import RewardValue, Rollout
from trimtab_adapters.contract.rewards import RewardSpec
from trimtab_adapters.contract.rollout_filter import RolloutFilter
from trimtab_adapters.contract.selection_cap import SelectionCap

NO_OPTIONS = SteeringOptions()
"""A steering that has nothing beside its adapters."""


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """A registered adapter version. `path` is its directory in the store."""

    name: str
    version: str
    path: str
    manifest: Manifest
    created_at: float
    retired_at: float | None = None
    pinned_at: float | None = None
    """Since when an admin keeps it in the engine's memory, whether a route uses it or not."""


@dataclass(frozen=True, slots=True)
class Canary:
    """A new version that a share of a route's requests tries, until it is promoted or rolled back.

    Attributes:
        version: The new one.
        steering: What the share is steered by, the new version among it.
        percent: Of the route's requests.
        num_answers: Requests of the share after which it is promoted, unless its answers are worse.
        min_answers: With fewer when the time is up it is rolled back.
        timeout_s: Time after which it ends.
    """

    version: VersionId
    steering: tuple[AdapterWeight, ...]
    percent: float
    num_answers: int
    min_answers: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class CanaryArm:
    """On which side of a canary a request came to lie.

    Attributes:
        revision: Of the route.
        version: The new one, whether the request tries it or not.
        percent: Of the route's requests.
        is_canary: Whether it tries it.
    """

    revision: int
    version: VersionId
    percent: float
    is_canary: bool


@dataclass(frozen=True, slots=True)
class RouteRevision:
    """One state of a route: a public model name with its steering and defaults. Revisions are never changed."""

    route: str
    revision: int
    steering: tuple[AdapterWeight, ...]
    best_of: int | None = None
    reward: str | None = None
    created_at: float = 0.0
    comment: str = ""
    options: SteeringOptions = NO_OPTIONS
    canary: Canary | None = None

    @property
    def weights(self) -> tuple[AdapterWeight, ...]:
        """Every version that a request to the route may be steered by, with its weight."""
        return self.steering if self.canary is None else (*self.steering, *self.canary.steering)


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """What a request's `model` and `steering` fields mean, pinned to exact versions at admission."""

    model: str
    """The name that the caller used; echoed in the answer."""
    base_model: str
    steering: tuple[AdapterWeight, ...]
    best_of: int | None = None
    reward: str | None = None
    options: SteeringOptions = NO_OPTIONS
    """The route's, with those of the request in their place."""
    canary: CanaryArm | None = None
    """None unless the route has a canary and the request left the adapters to the route."""


class Catalog(Protocol):
    """Adapters and routes. The database is the truth; reads come from memory."""

    async def resolve(
        self, model: str, steering: SteeringRequest | None, request_id: str | None = None
    ) -> ResolvedModel:
        """What a request means; its id decides about canaries, which nobody tries without one.

        Raises `NotFoundError` for an unknown model, adapter or version, `InvalidRequestError` for a retired one.
        """
        ...

    async def version(self, version: str) -> AdapterVersion:
        """Raises `NotFoundError`."""
        ...

    async def routes(self) -> Sequence[RouteRevision]:
        """The current revision of each route."""
        ...

    async def active_versions(self) -> Sequence[AdapterVersion]:
        """Versions that a route uses now or that are pinned: what an engine must hold before it is ready."""
        ...

    def is_kept(self, version: str) -> bool:
        """Whether a version is one of `active_versions`."""
        ...


class RolloutLog(Protocol):
    """Where candidates go. In `durable` mode `append` returns only when they are flushed to disk."""

    async def append(self, rollouts: Sequence[Rollout]) -> None:
        """Raises `StorageError`; nothing is lost silently."""
        ...


class RolloutReader(Protocol):
    """Reads the log, oldest first."""

    def read(self, where: RolloutFilter) -> AsyncIterator[Rollout]:
        """All matching rollouts in the order of `created_at`."""
        ...


@dataclass(frozen=True, slots=True)
class LoggedSample:
    """A logged rollout that is an independent sample of a reference policy.

    Attributes:
        prompt: Its text where the caller sent text.
        prompt_token_ids: As the engine saw them.
        output_text: What was generated.
        rewards: What was scored then.
    """

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    output_text: str
    rewards: tuple[RewardValue, ...] = ()


class SampleLog(Protocol):
    """Samples of reference policies in the rollout log.

    All candidates of a request count or none: chosen ones alone are no sample of the policy.
    """

    async def of_prompt(self, policy: str, prompt_token_ids: Sequence[int], *, limit: int) -> Sequence[LoggedSample]:
        """At most `limit` samples of one prompt, the newest requests first; `policy` is a `ReferencePolicy.key`."""
        ...


class CalibratorStore(Protocol):
    """Scores of reference rollouts per prompt, kept over restarts."""

    async def get(self, prompt_key: str, reward: str, reference: str) -> ReferenceScores | None:
        """`reward` is `name@version`, of a mix all of them; `reference` is the reference policy's key."""
        ...

    async def put(self, prompt_key: str, calibrator: ReferenceScores) -> None:
        """Replace what was stored for the same prompt, reward and reference."""
        ...


@dataclass(frozen=True, slots=True)
class StoredPooledCalibrator:
    """A pooled calibrator under its id.

    Attributes:
        id: Unique.
        calibrator: What applies it.
        report: How it did on prompts that took no part in the fit.
        created_at: Unix time in seconds.
    """

    id: str
    calibrator: PooledCalibrator
    report: dict[str, Any]
    created_at: float

    @property
    def reward_name(self) -> str:
        """The reward, without its version."""
        return self.calibrator.reward.partition("@")[0]


class PooledCalibratorStore(Protocol):
    """Pooled calibrators, kept over restarts."""

    async def get(self, calibrator_id: str) -> StoredPooledCalibrator | None:
        """By id."""
        ...

    async def of_reward(self, reward_name: str) -> Sequence[StoredPooledCalibrator]:
        """All of a reward, whatever its version, newest first."""
        ...


class RewardSpecs(Protocol):
    """Rewards registered by the admin API."""

    async def list(self) -> Sequence[RewardSpec]:
        """All of them."""
        ...

    async def put(self, spec: RewardSpec) -> None:
        """Add or replace by name."""
        ...

    async def delete(self, name: str) -> bool:
        """Whether there was one of that name. Raises `ConflictError` while a route names it."""
        ...


class SelectionCapStore(Protocol):
    """Measured caps for best-of-N, kept over restarts."""

    async def list(self) -> Sequence[SelectionCap]:
        """All of them, newest first."""
        ...

    async def put(self, cap: SelectionCap) -> None:
        """Replace what was stored for the same rewards and base model."""
        ...


JobState = Literal["queued", "running", "succeeded", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """A training job, from its posting to its end."""

    id: str
    state: JobState
    config: dict[str, Any]
    created_at: float
    updated_at: float
    worker: str | None = None
    progress: dict[str, Any] = field(default_factory=dict)
    version: str | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    name: str = ""
    attempt: int = 0
    """How often it was claimed. A worker names the attempt that it works on; an older one is over."""


@dataclass(frozen=True, slots=True)
class JobLine:
    """A line of a training job's log or metrics.

    Attributes:
        attempt: Which attempt wrote it, from 1.
        number: Its place in that attempt, from 1; numbers that are missing were too many to send.
        content: Text of the log, or figures by name.
        step: Of metrics: optimiser steps taken.
    """

    attempt: int
    number: int
    content: Any
    step: float | None = None
