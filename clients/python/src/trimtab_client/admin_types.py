"""What the admin API answers. Times are Unix seconds; sizes are bytes."""

from dataclasses import dataclass, field
from typing import Any, Literal

JobState = Literal["queued", "running", "succeeded", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """A registered adapter version. `version` is the hash of its content; `path` its directory in the store."""

    name: str
    version: str
    path: str = ""
    manifest: dict[str, Any] = field(default_factory=dict)
    created_at: float = 0.0
    retired_at: float | None = None
    pinned_at: float | None = None
    """Since when it is kept in the engine's memory, whether it is used or not."""
    routes: list[str] = field(default_factory=list)
    """Routes that use it now."""
    residency: dict[str, Any] = field(default_factory=dict)
    """Where it is now: `state` (`resident`, `loading`, `on_disk`), `weight_bytes`, and requests `in_flight`."""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AdapterWeight:
    """One term of a steering: an exact version and its weight."""

    name: str
    version: str
    alpha: float


@dataclass(frozen=True, slots=True)
class RouteRevision:
    """One state of a route: a public model name with its steering and defaults."""

    route: str
    revision: int
    steering: list[AdapterWeight] = field(default_factory=list)
    operators: dict[str, Any] = field(default_factory=dict)
    """What the steering has beside its adapters, as `put` takes it."""
    best_of: int | None = None
    reward: str | None = None
    created_at: float = 0.0
    comment: str = ""
    canary: dict[str, Any] | None = None
    """The version that a share of the route's requests tries: `version`, `percent` and more; None where none does."""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RolloutPage:
    """Logged candidates, oldest first, and where the next page begins."""

    data: list[dict[str, Any]]
    has_more: bool = False
    next_cursor: str | None = None


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """A training job, from its posting to its end. `version` is the adapter version that it published."""

    id: str
    state: JobState
    config: dict[str, Any] = field(default_factory=dict)
    created_at: float = 0.0
    updated_at: float = 0.0
    worker: str | None = None
    progress: dict[str, Any] = field(default_factory=dict)
    version: str | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    name: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reward:
    """A registered reward."""

    name: str
    kind: str = ""
    target: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    version: str | None = None
    """Changes whenever scores could change; known once the reward is built."""
    state: dict[str, Any] | None = None
    """Of its circuit breaker and cache, where one reward was asked for."""
    error: str | None = None
    """Why it cannot be used now."""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RewardScores:
    """Raw rewards, one per input and in its order, and the reward that gave them."""

    rewards: list[float]
    name: str = ""
    version: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine behind the gateway, with what it says of itself: versions held, cache, failed rows."""

    name: str
    is_available: bool = False
    status: dict[str, Any] | None = None
    error: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
